"""A standalone ONNX file -> compiled by AI Hub for a device -> latency, memory and placement of its layers (optional).

Reads ONNX_DIR/VIDEO_ONNX_NAME, and clips of CALIBRATION_DIR for w8a8 and w8a16; writes nothing: the compiled model
stays on AI Hub. The input keeps the layout that the ONNX file has. For a checkpoint use example_export.py, which also
checks and downloads what it makes.

$ python tools/compile_and_profile.py --onnx-dir /path/to/onnx_directory
$ python tools/local_hub.py python tools/compile_and_profile.py     # without an account, emulated on this CPU
"""

from pathlib import Path

from common import flags

from aihub import model_io, onnx_graphs, own_onnx, service

# ----------------------------------------------------------------------------------------------------------------------
ONNX_DIR = "."                          # folder of the ONNX file
VIDEO_ONNX_NAME = "model.onnx"          # its name
DEVICE_NAME = "Dragonwing IQ-9075 EVK"  # name of a device of AI Hub (qai-hub list-devices)
CHIPSET = ""                            # any device with this chipset instead, say qualcomm-qcs9075
BATCH, C, T, H, W = 1, 3, 16, 112, 112  # clip that the model takes; the file may have it as NCTHW or as NTHWC
PRECISION = "float"                     # float, w8a8 or w8a16
CALIBRATION_DIR = "./calibration_tensors"  # clips of training videos, which w8a8 and w8a16 are calibrated with
NUM_CALIBRATION_CLIPS = 100             # how many of them, as many of each class
SHARE = []                              # e-mail addresses that shall see the jobs: this is how an entry is submitted
COMPILE_OPTIONS = ""                    # more options of AI Hub's jobs, say --compile-options=--qairt_version=2.50
LINK_OPTIONS = ""
INFERENCE_OPTIONS = ""
# ----------------------------------------------------------------------------------------------------------------------


def main():
    flags.set_constants_from_flags(globals())
    wanted = own_onnx.Wanted(
        PRECISION, CALIBRATION_DIR, NUM_CALIBRATION_CLIPS, tuple(SHARE), COMPILE_OPTIONS, LINK_OPTIONS
    )
    own_onnx.check_wanted(wanted)
    path = Path(ONNX_DIR, VIDEO_ONNX_NAME)
    model, input_specs = onnx_graphs.load_onnx(path, (BATCH, C, T, H, W))
    ((name, (shape, dtype)),) = input_specs.items()
    print(f"{path}: valid, input {name}: {dtype} {shape}, {model_io.layout_of(shape)}")
    hub = service.connect_to_hub()
    with service.hub_errors_in_one_sentence():
        device = service.find_device(hub, DEVICE_NAME, CHIPSET)
        target_model, io = own_onnx.compile_onnx(hub, model, input_specs, device, wanted)
        options = service.job_options(service.qairt_version_of(target_model), INFERENCE_OPTIONS)
        service.profile(hub, device, target_model, path.stem, options)
    if io:
        print(f"input     {model_io.describe(io['input'])}")
        print(f"output    {model_io.describe(io['output'])}")
    print(f"model     {service.page_of(target_model)}")


if __name__ == "__main__":
    main()
