"""The calls of qai_hub 0.56's REST API, but for jobs: frameworks, devices, models, datasets, sharing.

A function takes (hub, query, body, ids of the path) and returns a protobuf message of `qai_hub.public_api_pb2`.
"""

import os
import shutil

import h5py

from . import job_life
from .compiled_models import EXTENSIONS
from .records import EMULATED, ModelRecord, RefusedError, full_qairt_version, new_id, pb, timestamp

# --- catalogue: frameworks, devices -----------------------------------------------------------------------------------


def make_device(name, os_version, chipset, *attributes):
    frameworks = ["framework:tflite", "framework:qnn", "framework:onnx"]
    common = ["vendor:qualcomm", "htp-supports-fp16:true", "emulated:cpu"]
    attributes = [f"chipset:{chipset}", *attributes, *frameworks, *common]
    return pb.Device(name=name, os=os_version, attributes=attributes, soc_description=EMULATED)


DEVICES = [
    make_device("Dragonwing IQ-9075 EVK", "1.9", "qualcomm-qcs9075", "os:qc_linux", "format:iot", "hexagon:v73",
                "soc-model:77"),
    make_device("Samsung Galaxy S25", "15", "qualcomm-snapdragon-8-elite-for-galaxy", "os:android", "format:phone",
                "hexagon:v79", "soc-model:69"),
]


def list_frameworks(hub, query, body):
    frameworks = [
        pb.Framework(name="QAIRT", api_version=version, full_version=full_qairt_version(version))
        for version in hub.qairt_versions
    ]
    frameworks[0].api_tags.extend(["default", "latest"])
    return pb.FrameworkList(frameworks=frameworks, total_query_count=len(frameworks))


def list_devices(hub, query, body):
    name, os_version = query.get("name", ""), query.get("os", "")
    attributes = set(query.getall("attributes", []))
    devices = [
        device
        for device in DEVICES
        if name in ("", device.name) and os_version in ("", device.os) and attributes <= set(device.attributes)
    ]
    if query.get("select") == "True":
        devices = devices[:1]
    return pb.DeviceList(devices=devices, total_query_count=len(devices))


# --- models -----------------------------------------------------------------------------------------------------------


def create_model(hub, query, body):
    model = pb.Model.FromString(body)
    if model.model_type not in EXTENSIONS:
        raise RefusedError(400, f"the local hub takes no {pb.ModelType.Name(model.model_type)}")
    model.model_id = new_id("m")
    model.creation_time.CopyFrom(timestamp())
    hub.models[model.model_id] = ModelRecord(model)
    return pb.CreateUpdateResponse(id=model.model_id, creation_time=model.creation_time)


def get_model(hub, query, body, model_id):
    return hub.find("models", model_id).message


def start_model_upload(hub, query, body, model_id):
    hub.find("models", model_id)
    num_parts = max(1, -(-int(query["file_size"]) // hub.max_part_bytes))
    upload_id = new_id("u")
    keys = [f"{upload_id}-{part}" for part in range(num_parts)]
    hub.upload_keys.update(dict.fromkeys(keys))
    urls = [f"{hub.url}/blob/{key}" for key in keys]
    upload = pb.FileMultipartUploadURL(urls=urls, upload_id=upload_id, max_part_size=hub.max_part_bytes)
    return pb.FileUploadResponse(multipart_url=upload)


def complete_model_upload(hub, query, body, model_id):
    model, upload = hub.find("models", model_id), pb.FileMultipartUploadComplete.FromString(body)
    keys = [f"{upload.upload_id}-{part}" for part in range(len(upload.etags))]
    if [hub.upload_keys.get(key) for key in keys] != list(upload.etags):
        raise RefusedError(400, "a part of the model did not arrive as it was sent; upload it again")
    path = hub.folder / f"{model_id}{EXTENSIONS[model.message.model_type]}"
    os.replace(hub.folder / keys[0], path)
    with open(path, "ab") as whole:
        for key in keys[1:]:
            with open(hub.folder / key, "rb") as part:
                shutil.copyfileobj(part, whole)
            os.remove(hub.folder / key)
    model.path = path
    model.message.file_upload_complete = True
    return pb.CreateUpdateResponse(id=model_id)


def download_model(hub, query, body, model_id):
    model = hub.find("models", model_id)
    if model.path is None:
        raise RefusedError(404, f"model {model_id} has no file")
    filename = model_id + EXTENSIONS[model.message.model_type] + (".zip" if model.message.is_directory else "")
    url = pb.FileDownloadURL(url=f"{hub.url}/blob/{model.path.name}", filename=filename)
    return pb.FileDownloadResponse(url=url)


# --- datasets ---------------------------------------------------------------------------------------------------------


def create_dataset(hub, query, body):
    dataset = hub.add_dataset(pb.Dataset.FromString(body).name)
    return pb.CreateUpdateResponse(
        id=dataset.dataset_id, creation_time=dataset.creation_time, expiration_time=dataset.expiration_time
    )


def get_dataset(hub, query, body, dataset_id):
    return hub.find("datasets", dataset_id).message


def start_dataset_upload(hub, query, body, dataset_id):
    hub.find("datasets", dataset_id)
    hub.delete_used_data()
    size = int(query.get("file_size", "0"))
    if size > hub.max_dataset_bytes:
        raise RefusedError(413, f"the dataset has {size:,} bytes, the limit is {hub.max_dataset_bytes:,}. ")
    key = f"{dataset_id}.h5"
    hub.upload_keys[key] = None
    return pb.FileUploadResponse(url=pb.FileUploadURL(url=f"{hub.url}/blob/{key}", file_field_name="file"))


def complete_dataset_upload(hub, query, body, dataset_id):
    dataset, path = hub.find("datasets", dataset_id), hub.folder / f"{dataset_id}.h5"
    if not h5py.is_hdf5(path):
        raise RefusedError(400, f"what was uploaded as dataset {dataset_id} is no HDF5 file")
    dataset.path = path
    dataset.message.file_upload_complete = True
    return pb.CreateUpdateResponse(id=dataset_id)


def download_dataset(hub, query, body, dataset_id):
    dataset = hub.find("datasets", dataset_id)
    if dataset.path is None or dataset.expired:
        raise RefusedError(404, f"dataset {dataset_id} has no data or has expired")
    url = pb.FileDownloadURL(url=f"{hub.url}/blob/{dataset.path.name}", filename=f"dataset-{dataset_id}.h5")
    return pb.FileDownloadResponse(url=url)


# --- sharing ----------------------------------------------------------------------------------------------------------


def get_sharing(hub, query, body, table, key):
    return pb.SharedAccess(email=hub.find(table, key).shared_with)


def change_sharing(hub, query, body, table, key):
    record, change = hub.find(table, key), pb.SharedAccessChange.FromString(body)
    kept = [email for email in record.shared_with if email not in change.remove_email]
    record.shared_with = list(dict.fromkeys([*kept, *change.add_email]))
    return pb.SharedAccess(email=record.shared_with)


def stop_sharing(hub, query, body, table, key):
    hub.find(table, key).shared_with = []
    return pb.SharedAccess()


ROUTES = [
    ("GET", "frameworks", list_frameworks),
    ("GET", "devices", list_devices),
    ("POST", "models", create_model),
    ("GET", "models/ID", get_model),
    ("GET", "models/ID/multipart_upload", start_model_upload),
    ("POST", "models/ID/multipart_upload", complete_model_upload),
    ("GET", "models/ID/download", download_model),
    ("POST", "datasets", create_dataset),
    ("GET", "datasets/ID", get_dataset),
    ("PATCH", "datasets/ID", complete_dataset_upload),
    ("GET", "datasets/ID/upload_url", start_dataset_upload),
    ("GET", "datasets/ID/download_data", download_dataset),
    ("POST", "jobs", job_life.create_job),
    ("GET", "jobs/ID", job_life.get_job),
    ("GET", "jobs/ID/result", job_life.get_job_result),
    ("GET", "(jobs|models|datasets)/ID/shared_access", get_sharing),
    ("PATCH", "(jobs|models|datasets)/ID/shared_access", change_sharing),
    ("DELETE", "(jobs|models|datasets)/ID/shared_access", stop_sharing),
]
