"""A model together with its processor, from whatever a person names: an exported folder, a run, a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fvlm.config import RunConfig
from fvlm.data.chat import Layout, load_tokenizer
from fvlm.data.chat_writer import TURN_END
from fvlm.evaluate.checkpoint import Checkpoint, open_checkpoint
from fvlm.evaluate.items import Presentation
from fvlm.hub.processing import FoveatedProcessor
from fvlm.model import FoveatedConfig, FoveatedVLM, MultiTokenVLM
from fvlm.research.records import RunRecords, read_run
from fvlm.schema import ConfigError

logger = logging.getLogger(__name__)
PROCESSOR_FILE = "processor_config.json"


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that can be asked."""

    model: FoveatedVLM | MultiTokenVLM
    processor: FoveatedProcessor
    checkpoint: Checkpoint

    @property
    def default_mode(self) -> str:
        """How it looks where nobody says: as deployed, or by the one query that its run trained."""
        return self.model.config.default_mode

    @property
    def fine_iterations(self) -> int:
        """Fine passes that its run began with, else 1."""
        return self.model.config.fine_iterations

    @property
    def presentation(self) -> Presentation:
        """How evaluation lays samples out, as the processor does."""
        processor, mixture = self.processor, self.checkpoint.mixture
        return Presentation(
            image_size=processor.frame_size,
            layout=Layout.QUESTION_FIRST if processor.question_first else Layout.VIDEO_FIRST,
            looks=processor.looks * mixture.tokens_per_frame,
            tokens_per_frame=mixture.tokens_per_frame,
            grid=mixture.grid,
        )


def open_model(name: str, tokenizer: str | None = None) -> OpenedModel:
    """Opens a folder of `launch/export.py`, a run (its best checkpoint), a checkpoint, or `hf:owner/name`.

    `tokenizer` is for a folder that names none, and replaces a run's. Raises ConfigError where there is no such thing,
    it cannot be read, or no tokenizer is known.
    """
    checkpoint = open_checkpoint(name)
    folder = Path(checkpoint.weights).parent
    try:
        if tokenizer is None and (folder / PROCESSOR_FILE).is_file():
            processor = FoveatedProcessor.from_pretrained(folder)
        else:
            processor = build_processor(checkpoint, tokenizer)
    except (OSError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"{name}: its processor: {error}") from error
    if checkpoint.config is not None:
        look_as_trained(checkpoint.model, checkpoint.config)
    stop_at_turn_end(checkpoint.model, processor.tokenizer)
    return OpenedModel(model=checkpoint.model, processor=processor, checkpoint=checkpoint)


def look_as_trained(model: FoveatedVLM | MultiTokenVLM, run: RunConfig) -> None:
    """Make the run's way of looking the model's default, which its folder then carries."""
    model.config.default_mode = "coarse_only" if run.train.mode == "coarse_only" else "autoregressive"
    model.config.fine_iterations = run.train.fine_iterations[0]


def stop_at_turn_end(model: FoveatedVLM | MultiTokenVLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let answers end where a turn does, if the tokenizer knows turns: a back bone's own end of text may be another."""
    if TURN_END not in tokenizer.get_vocab():
        return
    end, generation = tokenizer.convert_tokens_to_ids(TURN_END), model.llm.generation_config
    for config in (model.config.llm_config, model.llm.config, generation):
        config.eos_token_id = end
    generation.pad_token_id = end  # not a configuration's, which keeps gradients from that row of the embedding


def build_processor(checkpoint: Checkpoint, tokenizer: str | None = None) -> FoveatedProcessor:
    """The processor that shows media as the checkpoint's run did.

    Raises ConfigError where the tokenizer is not known or does not fit the model.
    """
    config, geometry = checkpoint.config, checkpoint.model.config
    name = tokenizer or (config.tokenizer if config else None)
    if name is None:
        raise ConfigError(
            f"--tokenizer: {checkpoint.weights} does not say which; give tiny, a Hugging Face id or a folder"
        )
    mixture = checkpoint.mixture
    return processor_for(geometry, name, looks=mixture.looks, question_first=mixture.question_first == 1)


def processor_for(
    geometry: FoveatedConfig, tokenizer: str, looks: int = 8, question_first: bool = False
) -> FoveatedProcessor:
    """A processor for a model's geometry.

    Args:
        tokenizer: `tiny`, a Hugging Face id or a folder.
        looks: visual tokens of a still in training; the multi-token baseline takes one frame.

    Raises ConfigError where the tokenizer cannot be read, has no chat format, or has more tokens than the model.
    """
    try:
        loaded = load_tokenizer(tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--tokenizer {tokenizer}: {error}") from error
    if len(loaded) > geometry.llm_config.vocab_size:
        raise ConfigError(
            f"--tokenizer {tokenizer}: {len(loaded)} tokens, but the model has {geometry.llm_config.vocab_size}; "
            f"choose the tokenizer that it was trained with"
        )
    copies = 1 if geometry.architecture == "multi_token" else max(1, looks // geometry.tokens_per_frame)
    shown = copies * geometry.tokens_per_frame
    if geometry.architecture == "foveated" and shown != looks:
        per_frame = geometry.tokens_per_frame
        logger.warning(
            "a still becomes %d visual tokens, in training %d: tokens_per_frame = %d does not divide looks = %d",
            *(shown, looks, per_frame, looks),
        )
    return FoveatedProcessor(loaded, frame_size=geometry.image_size, looks=copies, question_first=question_first)


def run_records(name: str) -> RunRecords | None:
    """The records of the run that `name`, its folder or one of its checkpoints, belongs to; None without any.

    Raises ValueError for a record that is there and cannot be read.
    """
    for folder in (Path(name), *Path(name).absolute().parents[:3]):
        if (folder / "checkpoints").is_dir():
            try:
                return read_run(folder)
            except FileNotFoundError:
                return None
    return None
