"""The spatial preprocessing of every clip: uint8 frames -> [0, 1] -> resized -> cropped.

Values are those of `resize(convert_image_dtype(clip, float32), antialias=False)` followed by a crop, the original's
order, within 1e-5: torchvision's weights preset resizes uint8 and rounds in between, which differs by up to half a
grey level. Only the pixels that the crop's bilinear taps read are touched, four for each of the crop's at most.
"""

import torch

from torchvision_patches.spatial_numpy import bilinear_taps, centre_of


def resize_and_crop(clip, resize_size, crop_size, top=None, left=None):
    """Resize a clip and crop it, reading only the pixels that count.

    clip: uint8 (T, H, W, 3), any H and W. resize_size, crop_size: (height, width) in pixels. top, left: where the crop
    starts inside the resized frame; None takes the centre.
    Returns float32 (3, T, crop height, crop width) in [0, 1], contiguous, not normalised.
    Raises ValueError if the crop does not lie inside the resized frame.
    """
    (height, width), (crop_height, crop_width) = resize_size, crop_size
    centre = centre_of(resize_size, crop_size)
    top, left = centre[0] if top is None else top, centre[1] if left is None else left
    if not (0 <= top <= height - crop_height and 0 <= left <= width - crop_width):
        raise ValueError(f"a crop of {crop_size} at ({top}, {left}) does not lie inside a frame of {resize_size}")
    row_taps = bilinear_taps(clip.shape[1], height, top, crop_height)
    column_taps = bilinear_taps(clip.shape[2], width, left, crop_width)
    low_row, high_row, row_weight = map(torch.from_numpy, row_taps)
    low_column, high_column, column_weight = map(torch.from_numpy, column_taps)
    rows, columns = torch.cat([low_row, high_row]), torch.cat([low_column, high_column])
    pixels = (rows[:, None] * clip.shape[2] + columns).flatten()
    column_weight = column_weight.repeat_interleave(3)  # (crop_width * 3,), one for each colour of a pixel
    output = torch.empty((len(clip), crop_height, crop_width * 3))
    for frame, result in zip(clip, output):  # one frame at a time stays in the processor's cache
        taps = frame.reshape(-1, 3).index_select(0, pixels).view(len(rows), -1).float()
        across = torch.lerp(taps[:, : crop_width * 3], taps[:, crop_width * 3 :], column_weight)
        torch.lerp(across[:crop_height], across[crop_height:], row_weight[:, None], out=result)
    return output.view(-1, crop_height, crop_width, 3).permute(3, 0, 1, 2).div(255).contiguous()
