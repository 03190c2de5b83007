"""Checkpoint -> model compiled for a device by AI Hub, downloaded into ./export_assets (the recommended path).

Reads a checkpoint of train.py and, for checks and calibration, the clips of preprocess_and_save.py. Goes through the
export pipeline of qai_hub_models with the recipe tools/qevd_r2plus1d. Writes, into `output_dir`:
  qevd_r2plus1d-<runtime>-<precision>-<chipset>/   the package's bundle: model, metadata.json, labels.txt
  resnet_2plus1d.bin                               the model again (.tflite, .dlc, .onnx for other runtimes)
  resnet_2plus1d.json                              its input and output as run_inference.py needs them, its jobs

$ python tools/example_export.py
$ python tools/example_export.py --precision w8a8 --skip-profiling false --skip-inferencing false
$ python tools/local_hub.py python tools/example_export.py      # without an account, emulated on this CPU
"""

import json
import shutil
from pathlib import Path

import aihub
import common

# ----------------------------------------------------------------------------------------------------------------------
checkpoint = "./checkpoint.pth"         # weights to export, as train.py wrote them
num_classes = 0                         # 0 = as the checkpoint says; any other number must agree with it
num_frames = 0                          # frames a clip; 0 = as the checkpoint says
data_dir = "./preprocessed_tensors"     # clips of preprocess_and_save.py to check and calibrate with; "" = one random
device = "Dragonwing IQ-9075 EVK"       # name of a device of AI Hub (qai-hub list-devices)
target_runtime = "qnn_context_binary"   # qnn_context_binary, qnn_dlc, tflite, onnx or precompiled_qnn_onnx
precision = "float"                     # float or w8a8 (8-bit weights and activations, some 5 times faster)
num_calibration_samples = 100           # clips that w8a8 is calibrated with, as many of each class
skip_profiling = True                   # do not measure latency and memory on the device
skip_inferencing = True                 # do not compare the device's logits with torch's on real clips
skip_downloading = False                # leave the compiled model on AI Hub
output_dir = "./export_assets"          # where the model is saved
share = []                              # e-mail addresses that shall see the jobs: this is how an entry is submitted
random_weights = False                  # export an untrained network on purpose
# ----------------------------------------------------------------------------------------------------------------------

RECIPE = common.REPO / "tools" / "qevd_r2plus1d"
# the package knows more, for language models
RUNTIMES = ("qnn_context_binary", "qnn_dlc", "tflite", "onnx", "precompiled_qnn_onnx")
PRECISIONS = ("float", "w8a8")


def check_constants():
    """Refuse what could only fail later."""
    if target_runtime not in RUNTIMES:
        common.refuse(f"target_runtime is {target_runtime!r}, possible are {', '.join(RUNTIMES)}")
    if precision not in PRECISIONS:
        common.refuse(f"precision is {precision!r}, possible are {', '.join(PRECISIONS)}")
    if not random_weights and not Path(checkpoint).is_file():
        common.refuse(
            f"there is no checkpoint {checkpoint}; train.py writes one, --checkpoint names another, and "
            f"--random-weights exports an untrained network on purpose"
        )
    if data_dir and not Path(data_dir, "manifest.jsonl").is_file():
        common.refuse(
            f"there is no manifest.jsonl in {data_dir}; run tools/preprocess_and_save.py, or check with a random clip "
            f"by --data-dir ''"
        )
    for email in share:
        if "@" not in email:
            common.refuse(f"{email!r} in share is no e-mail address")
    if precision != "float" and not data_dir:
        common.refuse("w8a8 is calibrated with clips: data_dir must name the folder with their manifest.jsonl")


def wait_for_each_job(hub):
    """Let every submission wait for its job and stop if it failed: the pipeline goes on with a failed job's handle."""

    def waiting(submit):
        def submit_and_wait(*args, **kwargs):
            job = submit(*args, **kwargs)
            aihub.wait_for(job)
            return job

        return submit_and_wait

    for name in ("submit_compile_job", "submit_quantize_job", "submit_link_job"):
        setattr(hub, name, waiting(getattr(hub, name)))


def model_arguments():
    """The arguments of the recipe's from_pretrained."""
    return {
        "checkpoint": checkpoint,
        "num_classes": num_classes,
        "num_frames": num_frames,
        "data_dir": data_dir,
        "num_calibration_clips": num_calibration_samples,
        "random_weights": random_weights,
    }


def run_pipeline(hub_device):
    """The package's own export, without its checks on the device: they come when the model is saved.

    Returns its ExportResult.
    """
    from qai_hub_models import Precision, TargetRuntime
    from qai_hub_models.utils.export.pipeline import export_model

    return export_model(
        RECIPE,
        hub_device,
        precision=Precision.parse(precision),
        target_runtime=TargetRuntime(target_runtime),
        skip_profiling=True,
        skip_inferencing=True,  # it would also send float clips to a quantised model
        skip_downloading=skip_downloading,
        skip_summary=True,
        output_dir=output_dir,
        **model_arguments(),
    )


def find_io(target_model, result):
    """What the compiled model takes and gives, as aihub.io_of has it; None if neither hub nor bundle says so."""
    # the hub does not describe every linked binary; the DLC that it was made of takes and gives the same
    io = aihub.io_of(target_model) or aihub.io_of(result.compile_job.get_target_model())
    if io or not result.download_path:
        return io
    return aihub.io_of_bundle(result.download_path, model_in_bundle(result.download_path))


def model_in_bundle(bundle):
    """The name of the bundle's model: a file in it, or <folder>/<file> for an ONNX model with a second file."""
    (name,) = json.loads(Path(bundle, "metadata.json").read_text(encoding="utf-8"))["model_files"]
    return name


def save_beside(result, description):
    """Copy the bundle's model to output_dir/resnet_2plus1d.* and write its description beside it; returns its path.

    An ONNX model with a second file (weights, or the binary around which it is) becomes a folder of the two, the form
    in which AI Hub takes it. The description goes last and names the content's hash, so that the two belong together
    whenever this is interrupted.
    """
    source = Path(result.download_path, model_in_bundle(result.download_path))
    path = Path(output_dir, "resnet_2plus1d").with_suffix(source.suffix)
    if path.is_dir():
        shutil.rmtree(path)
    if source.parent != Path(result.download_path):
        path.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        shutil.copytree(source.parent, temporary)
        temporary.rename(path)
    else:
        with common.written_then_renamed(path) as temporary:
            shutil.copyfile(source, temporary)
    description = {"file": path.name, "sha256": common.sha256_of(path)} | description
    with common.written_then_renamed(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return path


def compare_on_device(hub, hub_device, model, target_model, io):
    """Print how the device's logits agree with torch's on the model's sample clips: 8 of the manifest, by class."""
    import numpy as np
    import torch

    if not io:
        raise aihub.JobFailedError("AI Hub does not say what the model takes, so its logits are not compared")
    clips = model.sample_inputs(use_channel_last_format=False)["video"]
    expected = np.concatenate([model(torch.from_numpy(clip)).numpy() for clip in clips])
    inputs = {io["input"]["name"]: [aihub.as_model_input(clip, io["input"]) for clip in clips]}
    job = hub.submit_inference_job(target_model, hub_device, inputs, profile=False, name=target_model.name)
    aihub.wait_for(job)
    outputs = job.download_output_data() or {}
    arrays = outputs.get(io["output"]["name"]) or next(iter(outputs.values()), [])
    if len(arrays) != len(clips):
        raise aihub.JobFailedError(f"the inference job brought no output for its {len(clips)} clips; see {job.url}")
    logits = np.concatenate([aihub.as_logits(array, io["output"]) for array in arrays])
    error = np.mean((logits - expected) ** 2)
    psnr = 10 * np.log10(np.abs(expected).max() ** 2 / error) if error else np.inf
    agree = int((logits.argmax(1) == expected.argmax(1)).sum())
    print(f"on device against torch: PSNR {psnr:.1f} dB, largest difference {np.abs(logits - expected).max():.2g}, "
          f"the same Top-1 for {agree} of {len(clips)} clips")  # fmt: skip


def profile_on_device(hub, hub_device, model, target_model):
    """Print latency, memory and the placement of the layers on the device."""
    from qai_hub_models import TargetRuntime

    options = model.get_hub_inference_options(TargetRuntime(target_runtime))
    job = hub.submit_inference_job(target_model, hub_device, profile=True, name=target_model.name, options=options)
    aihub.wait_for(job)
    aihub.print_profile(job, hub_device)


def print_result(result, path, io):
    """What was made, what it takes and gives, and its jobs."""
    if path:
        print(f"model     {path}, bundle {result.download_path}")
    if io:
        print(f"input     {aihub.describe(io['input'])}, RGB in [0, 1]")
        print(f"output    {aihub.describe(io['output'])}, logits")
    for job in filter(None, (result.compile_job, result.link_job)):
        print(f"{job.job_type + ' job':<11} {job.job_id}  {job.url}")


def share_jobs(jobs):
    """Let the addresses in `share` see the jobs; prints the id of the first, the compile job."""
    for job in jobs:
        job.modify_sharing(add_emails=share)
    print(f"shared with {', '.join(share)}: quote compile job {jobs[0].job_id}")


def main():
    common.set_constants_from_flags(globals())
    check_constants()
    hub = aihub.connect_to_hub()
    from qevd_r2plus1d import Model

    with aihub.hub_errors_in_one_sentence():
        hub_device = aihub.find_device(hub, device)
        wait_for_each_job(hub)
        result = run_pipeline(hub_device)
        target_model = (result.link_job or result.compile_job).get_target_model()
        io = find_io(target_model, result)
        model = Model.from_pretrained(**model_arguments())
        description = (io or {}) | {
            "output_kind": "logits",
            "classes": model.classes,
            "target_runtime": target_runtime,
            "precision": precision,
            "device": device,
            "checkpoint": "" if random_weights else checkpoint,
            "compile_job": result.compile_job.job_id,
            "link_job": result.link_job.job_id if result.link_job else "",
        }
        path = None if skip_downloading else save_beside(result, description)
        print_result(result, path, io)
        if path:
            print(f'next: in tools/run_inference.py set\n    DLC_PATH = "{path}"')
        if share:
            share_jobs([job for job in (result.compile_job, result.link_job) if job])
        if not skip_profiling:
            profile_on_device(hub, hub_device, model, target_model)
        if not skip_inferencing:
            compare_on_device(hub, hub_device, model, target_model, io)


if __name__ == "__main__":
    main()
