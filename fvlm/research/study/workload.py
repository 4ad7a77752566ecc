"""What a configuration costs before it is run: operations a sample, samples a step, parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fvlm.config import ModelConfig, RunConfig
from fvlm.data.chat import load_tokenizer
from fvlm.model.flops import Sample, flops_per_sample
from fvlm.model.flops_parameters import ParameterCount, parameter_count
from fvlm.train.build import geometry, load_data
from fvlm.train.work import mean_sample


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Of one configuration, whatever its number of samples."""

    flops_per_sample: float
    """Forward and backward operations of a mean sample."""
    samples_per_step: float
    parameters: ParameterCount


@dataclass(frozen=True, kw_only=True)
class StatedSample:
    """A data set's mean sample, where it is stated instead of found from an index."""

    frames: float
    """Distinct frames."""
    text_tokens: float
    labels: float
    """Of these, those that carry loss."""
    looks: float = 1
    """At each frame; a share of stills, at 8 looks each, makes it more than 1."""


def workload(config: RunConfig, stated: StatedSample | None = None) -> Workload:
    """Operations from the run's own plan, window by window; or those of a mean sample that is stated.

    Raises ConfigError where the training data are not there, or the model's geometry is not.
    """
    if stated is not None:
        model = geometry(config.model, _vocabulary(config.model, config.tokenizer))
        sample = Sample.video_first(
            model, frames=stated.frames, text_tokens=stated.text_tokens, labels=stated.labels, looks=stated.looks
        )
        flops = flops_per_sample(model, sample, mode=config.train.mode, fine_iterations=config.train.fine_iterations)
        samples = config.train.packs_per_step * config.data.tokens / sample.tokens
        return Workload(flops_per_sample=flops.training, samples_per_step=samples, parameters=parameter_count(model))
    data = load_data(config)
    model = geometry(config.model, len(data.tokenizer))
    mean = mean_sample(model, data.plan, config.train.mode, config.train.fine_iterations)
    return Workload(
        flops_per_sample=mean.flops,
        samples_per_step=config.train.packs_per_step / mean.packs,
        parameters=parameter_count(model),
    )


@lru_cache
def parameters(model: ModelConfig, tokenizer: str) -> ParameterCount:
    """By component, of a run's model and tokenizer (`RunConfig.tokenizer`)."""
    return parameter_count(geometry(model, _vocabulary(model, tokenizer)))


def _vocabulary(model: ModelConfig, tokenizer: str) -> int:
    """Of the tiny models, which take the tokenizer's; published ones bring their own."""
    return len(load_tokenizer(tokenizer)) if model.is_tiny else 0
