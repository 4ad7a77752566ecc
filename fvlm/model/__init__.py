"""What the network computes: configuration, encoder, models, conversion, FLOPs."""

from transformers import AutoConfig

from .configuration import FoveatedConfig, tiny_config
from .fvlm import FoveatedVLM
from .multi_token import MultiTokenVLM
from .packed import PackedBatch

# transformers reads an exported folder's configuration by this class, and not by the code in the folder
AutoConfig.register(FoveatedConfig.model_type, FoveatedConfig)


def model_class(config: FoveatedConfig) -> type[FoveatedVLM] | type[MultiTokenVLM]:
    """The class that ``config.architecture`` names."""
    return {"foveated": FoveatedVLM, "multi_token": MultiTokenVLM}[config.architecture]


def build_model(config: FoveatedConfig) -> FoveatedVLM | MultiTokenVLM:
    """The model that ``config.architecture`` names, with random weights."""
    return model_class(config)(config)


__all__ = ["FoveatedConfig", "FoveatedVLM", "MultiTokenVLM", "PackedBatch", "build_model", "model_class", "tiny_config"]
