"""An ONNX file of the user's own at AI Hub: quantised if that is asked for, compiled, its jobs shared."""

from pathlib import Path
from typing import NamedTuple

import common

from aihub import model_io, service, tensors

PRECISIONS = {"float": None, "w8a8": (8, 8), "w8a16": (8, 16)}  # bits of weights and of activations


class Wanted(NamedTuple):
    """What shall be made of an ONNX file, by the constants of a script."""

    precision: str = "float"  # of PRECISIONS
    calibration_dir: str = ""  # clips of training videos, as preprocess_and_save.py writes them
    num_clips: int = 100  # of them, as many of each class
    share: tuple = ()  # e-mail addresses that shall see the jobs
    compile_options: str = ""
    link_options: str = ""


def check_wanted(wanted):
    """Exit with code 2 and one sentence for what could only fail later."""
    check_precision(wanted.precision)
    check_addresses(wanted.share)
    if wanted.precision != "float":
        check_calibration(wanted.precision, wanted.calibration_dir)


def check_precision(precision):
    if precision not in PRECISIONS:
        common.refuse(f"the precision is {precision!r}, possible are {', '.join(PRECISIONS)}")


def check_addresses(share):
    for email in share:
        if "@" not in email:
            common.refuse(f"{email!r} in share is no e-mail address")


def check_seen(share, device):
    """Exit with code 2 where jobs shall be shared and are of a local hub, before they are made."""
    if share and service.is_emulated(device):
        common.refuse(
            "--share: nobody else sees the jobs of a local hub, so they are no entry; leave out the flag, or export "
            "with an AI Hub account, without tools/local_hub.py"
        )


def check_calibration(precision, folder, clips=""):
    """Exit with code 2 and one sentence unless there are clips to calibrate with. clips: the flags that make such."""
    if not Path(folder, "manifest.jsonl").is_file():
        common.refuse(
            f"{precision} is calibrated with clips of training videos, but there is no manifest.jsonl in {folder} "
            f"(looked in {Path(folder).absolute()}): make them with tools/preprocess_and_save.py --data-root "
            f"TRAIN_FOLDER --out-root {folder} --max-per-class 2{clips}, or name another folder with "
            f"--calibration-dir, as a last resort that of the clips that are scored"
        )


def share_jobs(jobs, share):
    """Let the addresses see the jobs; prints the id of the first, the compile job that an entry is known by."""
    for job in jobs:
        job.modify_sharing(add_emails=list(share))
    print(f"shared with {', '.join(share)}: quote compile job {jobs[0].job_id}")


def compile_onnx(hub, model, input_specs, device, wanted):
    """Compile an ONNX model to a QNN context binary: directly or, where that is refused, to a DLC that is then linked.

    input_specs: {name: (shape, "float32")}, one clip. Returns (hub model, its description as model_io.io_of gives it or
    None). Raises JobFailedError.
    """
    check_seen(wanted.share, device)
    jobs = jobs_of_onnx(hub, model, input_specs, device, wanted)
    if wanted.share:
        share_jobs(jobs, wanted.share)
    made = [job.get_target_model() for job in reversed(jobs)]
    # the hub does not describe every linked binary; the DLC that it was made of takes and gives the same
    return made[0], next(filter(None, map(model_io.io_of, made)), None)


def jobs_of_onnx(hub, model, input_specs, device, wanted):
    """The jobs that `compile_onnx` needs: one, or two where the ONNX model was compiled to a DLC and linked."""
    from qai_hub.client import UserError

    source, options = hub.upload_model(model, name="model.onnx"), wanted.compile_options
    if wanted.precision != "float":
        source = quantised_by_hub(hub, source, input_specs, device, wanted)
        options = f"--quantize_io {options}".strip()
    direct, dlc = (f"--target_runtime {runtime} {options}".strip() for runtime in ("qnn_context_binary", "qnn_dlc"))
    try:
        job = hub.submit_compile_job(source, device, input_specs=input_specs, options=direct)
        service.wait_for(job)
        return [job]
    except (UserError, service.JobFailedError) as e:
        print(f"not compiled directly ({service.sentence_of(e)}); compiling to a DLC and linking it instead")
    job = hub.submit_compile_job(source, device, input_specs=input_specs, options=dlc)
    service.wait_for(job)
    link = hub.submit_link_job([job.get_target_model()], device, options=wanted.link_options)
    service.wait_for(link)
    return [job, link]


def quantised_by_hub(hub, source, input_specs, device, wanted):
    """The hub's model of an uploaded one, in integers, calibrated with clips. Raises JobFailedError."""
    import qai_hub

    ((name, (shape, _)),) = input_specs.items()
    rows = tensors.calibration_rows(wanted.calibration_dir, wanted.num_clips)
    # read_clip refuses others than those of the shape
    clips = (tensors.read_clip(wanted.calibration_dir, row, model_io.ncthw(shape)) for row in rows)
    clips = [model_io.in_layout(clip, shape) for clip in clips]
    # to ONNX first, as qai_hub_models does: AI Hub quantises what it has made itself
    job = hub.submit_compile_job(source, device, input_specs=input_specs, options="--target_runtime onnx")
    service.wait_for(job)
    weights, activations = (qai_hub.QuantizeDtype[f"INT{bits}"] for bits in PRECISIONS[wanted.precision])
    job = hub.submit_quantize_job(job.get_target_model(), {name: clips}, weights, activations)
    service.wait_for(job)
    return job.get_target_model()
