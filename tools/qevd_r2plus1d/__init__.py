"""The recipe folder that qai_hub_models' export pipeline imports: `Model` is what it exports."""

from .model import MODEL_ID
from .model import QevdR2Plus1D as Model

__all__ = ["MODEL_ID", "Model"]
