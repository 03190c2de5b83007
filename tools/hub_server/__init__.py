"""The local hub: a server on this machine that the real qai_hub client takes for Qualcomm AI Hub.

records.py          what it remembers: models, datasets, jobs; tensors
server.py           LocalHub: HTTP on 127.0.0.1, uploads and downloads
routes.py           the calls of qai_hub's REST API, but for jobs: devices, models, datasets, sharing
job_life.py         the life of a job: its options, submission, waiting, end
job_kinds.py        what each kind of job does: compile, quantize, link, inference, profile
source_models.py    uploaded models as ONNX, and their inputs and outputs changed as options ask
compiled_models.py  the files that jobs make of them, and onnxruntime sessions that run them
"""

from .server import LocalHub

__all__ = ["LocalHub"]
