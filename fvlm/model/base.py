"""What the foveated and the multi-token model share: sequence, language model, loss, loading and saving.

Shapes: T rows, C coarse rows, V visual tokens, F frames, S samples, K labels, d = language-model width, D = DINOv2's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    Dinov2Model,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import ModelOutput

from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.varlen_attention import varlen_attention
from . import answering, convert
from .branches import Branches, branched_hidden_states
from .configuration import MODES, FoveatedConfig
from .encoder import FoveatedEncoder
from .packed import PackedBatch
from .padded import pack_padded

CONNECTOR = ("q_static", "q_init", "dino_to_llm.", "llm_to_query.", "encoder.query_", "encoder.output_proj.")
ATTENTION = f"fvlm-{crc32(__name__.encode()):08x}"
"""Name of the attention below; an exported folder's copy of this module has another, so that each keeps its own."""


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its weights in `dtype`, changed in place and returned; buffers stay as they are.

    Rotary frequencies are buffers: rounded to bfloat16, late positions would be turned by wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _require_mode(mode: str, fine_iterations: int) -> None:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if fine_iterations < 1:
        raise ValueError(f"fine_iterations={fine_iterations}: expected at least 1")


def spread(count: int, share: float) -> tuple[bool, ...]:
    """Which of ``count`` blocks are chosen, so that ``share`` of any first ones are: (False, True) for 2 and 0.5."""
    return tuple(int((i + 1) * share + 1e-9) > int(i * share + 1e-9) for i in range(count))


def _attention(module, query, key, value, attention_mask, cu_seqlens=None, max_seqlen=None, **kwargs):
    """transformers' attention interface: packed rows go to ``varlen_attention``, cached decoding to SDPA."""
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    return varlen_attention(*rows, cu_seqlens, max_seqlen).unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attention)


def _decode(layer: nn.Module, rows: Tensor, positions: tuple, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One decoder layer over packed rows [1, ., d]; what is compiled is this, once for all layers."""
    return layer(rows, position_embeddings=positions, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


@dataclass
class VLMOutput(ModelOutput):
    """Result of a pass; fields that were not asked for are None."""

    loss: Tensor | None = None
    """Padded form with labels: mean loss over labels; 0 where there is none."""
    logits: Tensor | None = None
    """Padded form: [B, visual + text positions, vocabulary], zero at padding."""
    loss_sum: Tensor | None = None
    """float32 scalar: Σ −log p over labels."""
    logprobs: Tensor | None = None
    """float32 [K]: log p of each label, 0 where there is none."""
    num_labels: Tensor | None = None
    """int64 scalar."""
    coarse_loss_sum: Tensor | None = None
    """float32 scalar: the same loss with coarse tokens in the visual slots."""
    coarse_logprobs: Tensor | None = None
    """float32 [K], likewise."""
    attention_entropy: Tensor | None = None
    """float32 [V] nats, mean over layers and heads, of the queries behind the final visual tokens."""


@dataclass
class VisualTokens:
    """What a subclass puts into the visual slots."""

    tokens: Tensor
    """[V, d]."""
    coarse_tokens: Tensor | None = None
    """[V, d]."""
    entropy: Tensor | None = None
    """[V]."""
    maps: Tensor | None = None
    """[V, L, h, N]."""


class VisionLanguageModel(PreTrainedModel):
    """Frames become tokens in the slots of a language model's sequence; subclasses say how.

    Args:
        config: geometry.
        llm, dino: loaded backbones; random weights from ``config`` where None.
    """

    config_class = FoveatedConfig
    base_model_prefix = "fvlm"
    main_input_name = "frames"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {}

    def __init__(self, config: FoveatedConfig, llm: LlamaForCausalLM | None = None, dino: Dinov2Model | None = None):
        super().__init__(config)
        self.encoder = FoveatedEncoder(config, dino)
        self.llm = llm if llm is not None else LlamaForCausalLM(config.llm_config)
        self.llm.config._attn_implementation = ATTENTION
        self.dino_to_llm = nn.Linear(config.vision_config.hidden_size, config.llm_config.hidden_size)
        self._decode = _decode
        self.compiled = False
        """Whether blocks are compiled (:meth:`compile_blocks`)."""

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile one encoder block, one query block and one decoder layer, each for all layers that it serves.

        There is one graph a shape and mode (training, evaluation, recomputed or not), made at its first use; names of
        parameters stay as they are, and decoding with a cache is not compiled.
        """
        torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
        self._decode = torch.compile(_decode, backend=backend, fullgraph=True, dynamic=False)
        self.encoder.compile_blocks(backend)
        self.compiled = True

    # -- passes ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        frames: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        mode: str = "coarse_fine",
        fine_iterations: int = 1,
        frame_mask: Tensor | None = None,
        visual_at: Tensor | None = None,
        batch: PackedBatch | None = None,
        entropy: bool = False,
        coarse_loss: bool = False,
        branches: Branches | None = None,
    ) -> VLMOutput:
        """Padded form for people, or one pack: the same mathematics, on packs.

        Args:
            frames: float [B, n, 3, H, W] normalised, or uint8 pixels.
            input_ids: int64 [B, L] text.
            attention_mask: bool [B, L], False = padding (at the end).
            labels: int64 [B, L], label j predicted from position j−1: token j itself, −100 = none; a sample's first
                text token has no predecessor that could know it and never counts (docs/model.md, Loss).
            mode: ``coarse_fine``, ``coarse_only`` or ``autoregressive``.
            fine_iterations: fine passes of ``coarse_fine``.
            frame_mask: bool [B, n], False = padding (at the end).
            visual_at: int64 [B], number of text tokens before the frames; 0 = video first.
            batch: a pack, instead of all tensors above.
            entropy: also return the attention entropy.
            coarse_loss: also return the loss of the coarse tokens (``coarse_fine`` only).
            branches: texts that go on from the pack's samples; their labels count, and not the pack's.

        Raises:
            ValueError: an unknown mode, ``fine_iterations`` below 1, missing input, labels that are other tokens, or
                ``branches`` without a pack.
        """
        _require_mode(mode, fine_iterations)
        if branches is not None and (batch is None or coarse_loss):
            raise ValueError("branches go on from a batch=PackedBatch, and have no coarse_loss")
        if batch is not None:
            if batch.frames.device.type == "cpu" and not (self.compiled or torch.compiler.is_compiling()):
                batch = batch.without_unused()  # fixed shapes are for graphs
            return self._run(batch, mode, fine_iterations, entropy, coarse_loss, branches)[0]
        if frames is None or input_ids is None:
            raise ValueError("forward needs frames and input_ids, or batch=PackedBatch")
        padded = pack_padded(self.config, frames, input_ids, attention_mask, labels, frame_mask, visual_at)
        out, hidden = self._run(padded.batch, mode, fine_iterations, entropy, coarse_loss)
        positions = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[1])])[padded.row_of_position]
        out.logits = F.linear(positions, self.llm.lm_head.weight)
        if labels is not None:
            out.loss = out.loss_sum / out.num_labels.clamp(min=1)
        return out

    @torch.no_grad()
    def generate(
        self,
        frames: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mode: str | None = None,
        fine_iterations: int | None = None,
        frame_mask: Tensor | None = None,
        visual_at: Tensor | None = None,
        batch: PackedBatch | None = None,
        **options,
    ) -> Tensor:
        """Write on from each sample's text, after looking at its frames; arguments as of :meth:`forward`.

        Args:
            mode, fine_iterations: ``config.default_mode`` and ``config.fine_iterations`` unless given.
            batch: a pack without unused samples, instead of all tensors.
            options: of transformers' ``generate``: ``max_new_tokens``, ``num_beams``, ``do_sample``, ``streamer`` …
                It is called with embeddings, so that it returns new tokens only.

        Returns:
            int64 [B · num_return_sequences, new tokens], padded behind the end of a text.

        Raises:
            ValueError: an unknown mode, ``fine_iterations`` below 1, missing input, or shapes that do not fit.
        """
        mode = self.config.default_mode if mode is None else mode
        fine_iterations = self.config.fine_iterations if fine_iterations is None else fine_iterations
        _require_mode(mode, fine_iterations)
        if batch is None:
            if frames is None or input_ids is None:
                raise ValueError("generate needs frames and input_ids, or batch=PackedBatch")
            batch = pack_padded(self.config, frames, input_ids, attention_mask, None, frame_mask, visual_at).batch
        return answering.generate(self, batch, mode, fine_iterations, **options)

    def _run(self, batch, mode, fine_iterations, entropy, coarse_loss, branches=None) -> tuple[VLMOutput, Tensor]:
        text = self.llm.get_input_embeddings()(batch.token_ids)
        visual = self.visual_tokens(batch, text, mode, fine_iterations, entropy)
        if branches is None:
            hidden = self.hidden_states(batch, text, visual.tokens)
        else:
            hidden = branched_hidden_states(self, batch, branches, text, visual.tokens)
        loss = self._loss(batch if branches is None else branches, hidden)
        out = VLMOutput(
            loss_sum=loss.loss_sum,
            logprobs=loss.logprobs,
            num_labels=loss.num_labels,
            attention_entropy=visual.entropy,
        )
        if coarse_loss and visual.coarse_tokens is not None:
            coarse = self._loss(batch, self.hidden_states(batch, text, visual.coarse_tokens))
            out.coarse_loss_sum, out.coarse_logprobs = coarse.loss_sum, coarse.logprobs
        return out, hidden

    def visual_tokens(
        self, batch: PackedBatch, text: Tensor, mode: str, fine_iterations: int, entropy: bool
    ) -> VisualTokens:
        """The tokens of every visual slot; ``text`` are the embedded rows [T, d]."""
        raise NotImplementedError

    def to_llm(self, z: Tensor) -> Tensor:
        """What the encoder saw [., D] as a language-model token [., d]."""
        return self.config.visual_scale * self.dino_to_llm(z)

    def sequence(self, batch: PackedBatch, text: Tensor, visual: Tensor) -> Tensor:
        """[T+1, d]: the rows with their visual slots filled; the last row takes what unused slots hold."""
        rows = torch.cat([text, text.new_zeros(1, text.shape[1])])
        return rows.index_copy(0, batch.visual_index, visual.to(rows.dtype))

    def hidden_states(self, batch: PackedBatch, text: Tensor, visual: Tensor) -> Tensor:
        """[T, d] after the final norm, over whole samples."""
        rows = self.sequence(batch, text, visual)[:-1]
        return self.run_llm(rows, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)

    def run_llm(self, rows: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """The language model's trunk over packed rows."""
        trunk, rows = self.llm.model, rows.unsqueeze(0)
        positions = trunk.rotary_emb(rows, position_ids.unsqueeze(0))
        for layer in trunk.layers:
            rows = self._decode(layer, rows, positions, cu_seqlens, max_seqlen)
        return trunk.norm(rows).squeeze(0)

    def _loss(self, batch: PackedBatch | Branches, hidden: Tensor):
        return linear_cross_entropy(hidden.index_select(0, batch.loss_index), self.llm.lm_head.weight, batch.labels)

    # -- parameters -----------------------------------------------------------------------------------------------

    def param_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Trainable parameters by group: ``connector``, ``dino``, ``llm`` (docs/model.md, Parameters)."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {"connector": [], "dino": [], "llm": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                group = "connector" if name.startswith(CONNECTOR) else "llm" if name.startswith("llm.") else "dino"
                groups[group].append((name, parameter))
        return groups

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict | None = None, *, encoder: float = 1.0, llm: float = 1.0
    ) -> None:
        """Recompute blocks in the backward pass (non-reentrant).

        Args:
            gradient_checkpointing_kwargs: None or ``{"use_reentrant": False}``, as transformers' callers pass it.
            encoder, llm: share of the part's blocks, spread evenly: 1 = all, 0.5 = every second, 0 = none.

        Raises:
            ValueError: another mode, or a share outside of [0, 1].
        """
        if gradient_checkpointing_kwargs not in (None, {"use_reentrant": False}):
            raise ValueError(
                f"gradient_checkpointing_kwargs={gradient_checkpointing_kwargs}: only non-reentrant is supported"
            )
        for name, share in (("encoder", encoder), ("llm", llm)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: expected a share of its blocks, between 0 and 1")
        self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        for layer, chosen in zip(self.llm.model.layers, spread(len(self.llm.model.layers), llm), strict=True):
            layer.gradient_checkpointing = chosen
        self.encoder.recomputed = spread(len(self.encoder.dino.encoder.layer), encoder)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules are initialised where they are made."""

    # -- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls, llm: str | Path | PreTrainedConfig, vision: str | Path | PreTrainedConfig, **overrides
    ) -> VisionLanguageModel:
        """Join two backbones.

        Args:
            llm, vision: a Hugging Face id or a folder (weights are loaded), or a configuration (random weights).
            overrides: further fields of :class:`FoveatedConfig`.

        Raises:
            OSError: an id or folder that cannot be read (from transformers, with its advice).
        """
        llm_config, dino_config = (
            x if isinstance(x, PreTrainedConfig) else AutoConfig.from_pretrained(x) for x in (llm, vision)
        )
        if not isinstance(llm, PreTrainedConfig):
            llm = LlamaForCausalLM.from_pretrained(llm, dtype=torch.float32)
        if not isinstance(vision, PreTrainedConfig):
            vision = Dinov2Model.from_pretrained(vision, dtype=torch.float32)
        config = FoveatedConfig(llm_config=llm_config, vision_config=dino_config, **overrides)
        return cls(
            config,
            llm=None if isinstance(llm, PreTrainedConfig) else llm,
            dino=None if isinstance(vision, PreTrainedConfig) else vision,
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, config: FoveatedConfig | None = None) -> VisionLanguageModel:
        """Load a folder of :meth:`save_pretrained`, a Hugging Face id, or a published ``.pt``/``.safetensors`` file.

        Args:
            path: what to load. An id is downloaded.
            config: the geometry, for files that do not carry one.

        Raises:
            FileNotFoundError, ValueError: nothing to load, no geometry, or names and shapes that do not fit (listed).
        """
        weights, found_config = convert.locate(path)
        config = config or found_config
        if config is None:
            raise ValueError(f"{weights} carries no geometry: pass config=FoveatedConfig(...)")
        model = cls(config)
        convert.load_into(model, convert.read_state_dict(weights), str(weights))
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, state_dict: dict[str, Tensor] | None = None, **_) -> None:
        """Write ``config.json`` and ``model.safetensors`` under the published parameter names, tied head once.

        ``state_dict`` replaces the model's own weights, such as a copy of them from before.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        convert.write_safetensors(self, Path(folder) / "model.safetensors", state_dict)
