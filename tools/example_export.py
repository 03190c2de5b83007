"""Checkpoint -> model compiled for a device by AI Hub, downloaded into ./export_assets (the recommended path).

Reads a checkpoint of train.py and clips of preprocess_and_save.py: some that are scored, to check the model with, and
some of training videos, to calibrate a quantised one with. Goes through the export pipeline of qai_hub_models with the
recipe tools/qevd_r2plus1d. Writes, into `output_dir`:
  qevd_r2plus1d-<runtime>-<precision>-<chipset>/   the package's bundle: model, metadata.json, labels.txt, clip.json;
                                                   qevd_<network>-… for others, qevd_<networks>_of_<n>-… for several
  resnet_2plus1d.bin                               the model again, whatever network (.tflite, .dlc, .onnx: runtimes)
  resnet_2plus1d.json                              what run_inference.py needs to know of it: input, output, jobs,
                                                   QAIRT version, torch's logits of one clip, how its clips are made

$ python tools/example_export.py
$ python tools/example_export.py --checkpoint seed1.pth seed2.pth seed3.pth
$ python tools/example_export.py --precision w8a8 --skip-profiling false --skip-inferencing false
$ python tools/local_hub.py python tools/example_export.py      # without an account, emulated on this CPU
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import common
from common import flags
from common.checkpoints import best_beside

from aihub import logits_file, model_io, own_onnx, service, tensors
from aihub.jobs import logits_of

# ----------------------------------------------------------------------------------------------------------------------
checkpoint = ["./checkpoint.pth"]       # weights to export, as train.py wrote them; several vote, in one model
best = False                            # True = model_best.pth beside each of them, of the best validation, instead
checkpoint_weights = []                 # how much each checkpoint's vote counts, say 2 1 1; [] = all alike
mirror = False                          # True = the mirror image of a clip votes, too; twice the time
num_classes = 0                         # 0 = as the checkpoint says; any other number must agree with it
num_frames = 0                          # frames a clip; 0 = as the checkpoint says
data_dir = "./preprocessed_tensors"     # clips of preprocess_and_save.py to check with; "" = one random clip
device = "Dragonwing IQ-9075 EVK"       # name of a device of AI Hub (qai-hub list-devices)
chipset = ""                            # any device with this chipset instead, say qualcomm-qcs9075
target_runtime = "qnn_context_binary"   # qnn_context_binary, qnn_dlc, tflite, onnx or precompiled_qnn_onnx
precision = "float"                     # float, w8a8 (8-bit weights and activations, some 5 times faster) or w8a16
CALIBRATION_DIR = "./calibration_tensors"  # clips of training videos, which w8a8 and w8a16 are calibrated with
num_calibration_samples = 100           # how many of them, as many of each class
skip_profiling = True                   # do not measure latency and memory on the device
skip_inferencing = True                 # do not compare the device's logits with torch's on real clips
skip_downloading = False                # leave the compiled model on AI Hub
output_dir = "./export_assets"          # where the model is saved
zip_assets = False                      # the bundle as one .zip
compile_options = ""                    # more options of AI Hub's jobs, say --compile-options=--qairt_version=default
quantize_options = ""
link_options = ""
inference_options = ""
share = []                              # e-mail addresses that shall see the jobs: this is how an entry is submitted
random_weights = False                  # export an untrained network on purpose
# ----------------------------------------------------------------------------------------------------------------------

RECIPE = common.REPO / "tools" / "qevd_r2plus1d"
# the package knows more, for language models
RUNTIMES = ("qnn_context_binary", "qnn_dlc", "tflite", "onnx", "precompiled_qnn_onnx")


def check_export(paths):
    """Refuse what could only fail later. paths: of the checkpoints."""
    if target_runtime not in RUNTIMES:
        common.refuse(f"target_runtime is {target_runtime!r}, possible are {', '.join(RUNTIMES)}")
    own_onnx.check_precision(precision)
    for path in [] if random_weights else paths or [""]:
        if not Path(path).is_file():
            common.refuse(
                f"there is no checkpoint {path} (looked in {Path(path).absolute()}); train.py writes one, --checkpoint "
                f"names another, say model.pth, and --random-weights exports an untrained network on purpose"
            )
    if data_dir and not Path(data_dir, "manifest.jsonl").is_file():
        common.refuse(
            f"there is no manifest.jsonl in {data_dir} (looked in {Path(data_dir).absolute()}); run "
            f"tools/preprocess_and_save.py, or check with a random clip by --data-dir ''"
        )
    own_onnx.check_addresses(share)
    if precision != "float":
        clips = "" if random_weights else f" --checkpoint {paths[0]}"
        own_onnx.check_calibration(precision, CALIBRATION_DIR, clips)


def checkpoint_paths():
    """The paths of the checkpoints to export; with `best`, of the model_best.pth beside each.

    Where ./checkpoint.pth is not there and model.pth, the manual's other name for it, is, that one is exported.
    """
    if best and not random_weights:
        return [best_beside(path) for path in checkpoint]
    if checkpoint == ["./checkpoint.pth"] and not Path(checkpoint[0]).exists() and Path("model.pth").is_file():
        print("there is no ./checkpoint.pth: exporting ./model.pth")
        return ["./model.pth"]
    return checkpoint


def check_qairt_is_offered(hub):
    """Refuse if AI Hub no longer offers the version of QAIRT that qai_hub_models asks for and no option names one."""
    from qai_hub_models import TargetRuntime

    runtime = TargetRuntime(target_runtime)
    needed = {"compile": runtime.qairt_version_changes_compilation, "link": runtime.uses_hub_link, "inference": True}
    given = {"compile": compile_options, "link": link_options, "inference": inference_options}
    missing = [job for job, asked in needed.items() if asked and "--qairt_version" not in given[job]]
    try:
        if missing:
            runtime.default_qairt_version  # noqa: B018
    except ValueError:
        offered = ", ".join(f.api_version for f in hub.get_frameworks() if f.name == "QAIRT")
        common.refuse(
            f"AI Hub no longer offers the version of QAIRT that this qai_hub_models asks for, but {offered}; add "
            f"{' '.join(f'--{job}-options=--qairt_version=default' for job in missing)}"
        )


@contextlib.contextmanager
def each_job_waited_for(hub):
    """Let every submission wait for its job and stop if it failed: the pipeline goes on with a failed job's handle.

    Nor does the client name the temporary file that it downloads a model to.
    """
    from qai_hub import client

    def say(*words, **options):
        if not " ".join(map(str, words)).startswith("Downloaded model to "):
            print(*words, **options)

    def waiting(submit):
        def submit_and_wait(*args, **kwargs):
            job = submit(*args, **kwargs)
            service.wait_for(job)
            return job

        return submit_and_wait

    names = "submit_compile_job", "submit_quantize_job", "submit_link_job"
    with contextlib.ExitStack() as patches:
        for name in names:
            patches.callback(setattr, hub, name, getattr(hub, name))
            setattr(hub, name, waiting(getattr(hub, name)))
        client.print = say
        patches.callback(delattr, client, "print")
        yield


def build_model(paths):
    """The deployed network of the checkpoints, by the recipe."""
    from qevd_r2plus1d import Model

    model = Model.from_pretrained(
        checkpoint=paths,
        num_classes=num_classes,
        num_frames=num_frames,
        weights=checkpoint_weights,
        mirrored=mirror,
        data_dir=data_dir,
        calibration=(CALIBRATION_DIR, num_calibration_samples),
        random_weights=random_weights,
    )
    for folder in {data_dir, CALIBRATION_DIR if precision != "float" else ""} - {""}:
        tensors.check_tensors(folder, ", ".join(paths), model.description)
    if len(model.voters) > 1:
        print(f"{len(model.voters)} networks vote: {', '.join(paths)}")
    return model


def run_pipeline(hub, hub_device, model, folder):
    """The package's own export into a folder, without its checks on the device: they come when the model is saved.

    Returns its ExportResult.
    """
    from qai_hub_models import Precision, TargetRuntime
    from qai_hub_models.utils.export.pipeline import export_model

    with each_job_waited_for(hub):
        return export_model(
            RECIPE,
            hub_device,
            precision=Precision.parse(precision),
            target_runtime=TargetRuntime(target_runtime),
            skip_profiling=True,
            skip_inferencing=True,  # it would also send float clips to a quantised model
            skip_downloading=skip_downloading,
            skip_summary=True,
            output_dir=folder,
            compile_options=compile_options,
            quantize_options=quantize_options,
            link_options=link_options,
            inference_options=inference_options,
            built=model,
        )


def find_io(target_model, result):
    """What the compiled model takes and gives, as model_io.io_of has it; None if neither hub nor bundle says so."""
    # the hub does not describe every linked binary; the DLC that it was made of takes and gives the same
    io = model_io.io_of(target_model) or model_io.io_of(result.compile_job.get_target_model())
    if io or not result.download_path:
        return io
    return model_io.io_of_bundle(result.download_path, model_in_bundle(result.download_path))


def model_in_bundle(bundle):
    """The name of the bundle's model: a file in it, or <folder>/<file> for an ONNX model with a second file."""
    (name,) = json.loads(Path(bundle, "metadata.json").read_text(encoding="utf-8"))["model_files"]
    return name


def save_bundle(made, name):
    """Move a finished bundle into output_dir, under a name, in place of an earlier one of it; returns its path."""
    bundle = Path(output_dir, name)
    for folder in (made, *(path for path in made.rglob("*") if path.is_dir())):
        folder.chmod(0o777 & ~umask())  # the package makes it in a temporary folder, which nobody else may read
    for earlier in (bundle, bundle.with_name(f"{bundle.name}.zip")):
        if earlier.exists():
            earlier.rename(made.parent / f"earlier-{earlier.name}")  # deleted with the temporary folder
    made.rename(bundle)
    return bundle


def umask():
    """The permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def zip_bundle(bundle):
    """The bundle as one .zip instead of a folder; returns its path."""
    path = shutil.make_archive(str(bundle), "zip", root_dir=bundle.parent, base_dir=bundle.name)
    shutil.rmtree(bundle)
    return Path(path)


def save_beside(bundle, description):
    """Copy the bundle's model to output_dir/resnet_2plus1d.* and write its description beside it; returns its path.

    An ONNX model with a second file (weights, or the binary around which it is) becomes a folder of the two, the form
    in which AI Hub takes it. The description goes last and names the content's hash, so that the two belong together
    whenever this is interrupted.
    """
    source = Path(bundle, model_in_bundle(bundle))
    path = Path(output_dir, "resnet_2plus1d").with_suffix(source.suffix)
    if path.is_dir():
        shutil.rmtree(path)
    if source.parent != Path(bundle):
        path.unlink(missing_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        shutil.copytree(source.parent, temporary)
        temporary.rename(path)
    else:
        with common.written_then_renamed(path) as temporary:
            shutil.copyfile(source, temporary)
    description = {"file": path.name, "sha256": common.sha256_of(path)} | description
    common.write_text(path.with_suffix(".json"), json.dumps(description, indent=2) + "\n")
    return path


def note(path, **facts):
    """Add what became known after the export to the description beside the model, if it was downloaded."""
    if path:
        described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) | facts
        common.write_text(path.with_suffix(".json"), json.dumps(described, indent=2) + "\n")


def logits_of_one_clip(model):
    """{digest of a clip of data_dir, torch's logits of it}, which run_inference.py compares its first clip with."""
    import torch

    clip = model.sample_inputs(use_channel_last_format=False)["video"][0]
    return {"digest": model_io.clip_digest(clip), "logits": model(torch.from_numpy(clip))[0].tolist()}


def options_of_jobs(model, qairt_version):
    """Options of inference and profile jobs: those of the recipe, the version that made the binary, the user's."""
    from qai_hub_models import TargetRuntime

    options = service.job_options(qairt_version, inference_options)
    return model.get_hub_inference_options(TargetRuntime(target_runtime), options)


def compare_on_device(hub, hub_device, model, target_model, io, options=""):
    """Print how the device's logits agree with torch's on the model's sample clips: 8 of the manifest, by class."""
    import numpy as np
    import torch

    if not io:
        raise service.JobFailedError("AI Hub does not say what the model takes, so its logits are not compared")
    clips = model.sample_inputs(use_channel_last_format=False)["video"]
    expected = np.concatenate([model(torch.from_numpy(clip)).numpy() for clip in clips])
    inputs = {io["input"]["name"]: [model_io.as_model_input(clip, io["input"]) for clip in clips]}
    job = hub.submit_inference_job(
        target_model, hub_device, inputs, profile=False, name=target_model.name, options=options
    )
    service.wait_for(job)
    logits = logits_of(job, job.get_status(), len(clips), io["output"], lambda _, call: call())
    agreed = logits_file.agreement(logits, expected)
    print(f"on device against torch: {logits_file.agreement_in_words(agreed, len(clips))}")


def print_result(result, path, bundle, io):
    """What was made, what it takes and gives, and its jobs."""
    if path:
        print(f"model     {path}, bundle {bundle}")
    if io:
        print(f"input     {model_io.describe(io['input'])}, RGB in [0, 1]")
        print(f"output    {model_io.describe(io['output'])}, logits")
    for job in filter(None, (result.compile_job, result.link_job)):
        page = service.page_of(job)
        print(f"{job.job_type + ' job':<11} {page if page.startswith(job.job_id) else f'{job.job_id}  {page}'}")


def print_next(path, emulated):
    """The command of the next step and, for a model of the local hub, that of Qualcomm's own compiler."""
    clips = {"data_path": data_dir} if data_dir else {}
    command = flags.next_command("run_inference.py", path, DLC_PATH=path, **clips)
    print(f"next: {flags.LOCAL_HUB * emulated}{command.removeprefix(flags.LOCAL_HUB)}")
    if emulated:
        ask = flags.next_command("compile_offline.py", path, source=path)
        print(f"under {service.LATENCY_GATE_MS} ms? Qualcomm's own compiler, on this machine: {ask}")


def export(hub, hub_device, model):
    """Compile and save the model. Returns (its path or None, hub's compiled model, what it takes and gives or None,
    version of QAIRT, compile and link job)."""
    for left_by_a_kill in Path(output_dir).glob(".export-*"):
        shutil.rmtree(left_by_a_kill)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output_dir) as folder:
        result = run_pipeline(hub, hub_device, model, folder)
        target_model = (result.link_job or result.compile_job).get_target_model()
        io = find_io(target_model, result)
        if io:
            model_io.check_scale(io["output"])
        qairt_version = service.qairt_version_of(target_model)
        jobs = [job for job in (result.compile_job, result.link_job) if job]
        description = (io or {}) | {
            "output_kind": "logits",
            **model.about(),
            "target_runtime": target_runtime,
            "precision": precision,
            "device": hub_device.name,
            "compile_job": result.compile_job.job_id,
            "link_job": result.link_job.job_id if result.link_job else "",
            "qairt_version": qairt_version,
            "probe": logits_of_one_clip(model) if data_dir else None,
        }
        path = bundle = None
        if not skip_downloading:
            made = Path(result.download_path)
            bundle = save_bundle(made, made.name.replace(RECIPE.name, model.bundle_id, 1))
            path = save_beside(bundle, description)
            bundle = zip_bundle(bundle) if zip_assets else bundle
    print_result(result, path, bundle, io)
    if path:
        print_next(path, service.is_emulated(hub_device))
    return path, target_model, io, qairt_version, jobs


def main():
    flags.set_constants_from_flags(globals())
    paths = checkpoint_paths()
    check_export(paths)
    hub = service.connect_to_hub()
    with service.hub_errors_in_one_sentence():
        hub_device = service.find_device(hub, device, chipset)
        own_onnx.check_seen(share, hub_device)
        check_qairt_is_offered(hub)
        model = build_model(paths)
        with common.only_writer(Path(output_dir, "resnet_2plus1d"), "--output-dir"):
            path, target_model, io, qairt_version, jobs = export(hub, hub_device, model)
        if share:
            own_onnx.share_jobs(jobs, share)
            note(path, shared=time.strftime("%Y-%m-%d %H:%M"))
        options = options_of_jobs(model, qairt_version)
        if not skip_profiling:
            milliseconds = service.profile(hub, hub_device, target_model, target_model.name, options)
            if not service.is_emulated(hub_device):
                note(path, profiled_ms=milliseconds)
        if not skip_inferencing:
            compare_on_device(hub, hub_device, model, target_model, io, options)


if __name__ == "__main__":
    main()
