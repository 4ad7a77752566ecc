"""A checkpoint to be judged: its weights, and the configuration that says how samples were shown to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fvlm.config import RunConfig, load_config
from fvlm.data.plan import Mixture
from fvlm.model import FoveatedVLM, MultiTokenVLM, convert, model_class
from fvlm.schema import ConfigError
from fvlm.train.build import HUB, find_init, mixture


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Weights and what is known of how they were trained."""

    weights: str
    """What `from_pretrained` reads."""
    model: FoveatedVLM | MultiTokenVLM
    config: RunConfig | None
    """The run's configuration; None for a model folder or a published file."""

    @property
    def mixture(self) -> Mixture:
        """How samples are shown: as in training, or by the model's own geometry."""
        if self.config is not None:
            return mixture(self.config)
        geometry = self.model.config
        grid = geometry.grid if geometry.architecture == "multi_token" else 0
        return Mixture(grid=grid, tokens_per_frame=1 if grid else geometry.tokens_per_frame)


def open_checkpoint(name: str) -> Checkpoint:
    """Opens a run's folder (its best checkpoint), a checkpoint, a model folder or file, or `hf:owner/name`.

    Raises ConfigError where there is no such thing or its weights cannot be read.
    """
    source = find_init(name)
    try:
        weights, geometry = convert.locate(source)
        if geometry is None:
            raise ConfigError(f"{name}: carries no geometry; import it into a model folder first")
        model = model_class(geometry).from_pretrained(weights, config=geometry)
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint {name!r}: {error}") from error
    return Checkpoint(weights=str(weights), model=model, config=None if name.startswith(HUB) else _run_config(source))


def _run_config(source: str) -> RunConfig | None:
    """The configuration saved in the checkpoint that `source`, a folder of weights, belongs to."""
    path = Path(source).parent / "config.yaml"
    return load_config(str(path)) if Path(source).name == "weights" and path.is_file() else None
