"""The prompt encoder: a small network whose output is the table of virtual-token vectors.

    table = network(embedding([0 … n-1]))          Liu et al. 2021 (arXiv 2103.10385), section 3.1

The network is an MLP, a bidirectional LSTM followed by an MLP, or nothing. Module names, shapes and
outputs equal the reference's (PEFT 0.21.2, ``PromptEncoder``), so weights can be exchanged. Two
more are this project's own:

    residual   table = P + LayerNorm(W_up ReLU(W_down P))     Razdaibiedina et al. 2023
               (arXiv 2305.03937), section 3: one bottleneck for all virtual tokens; the gain of the
               LayerNorm begins at zero here, so that the table begins as P
    mixture    table = W E                                    SadraeiJavaheri et al. 2024
               (arXiv 2406.05279), section 3: E are m vectors of the vocabulary, which stay; W is
               trained, and begins with one word for each virtual token

After training only the output is needed. This module knows nothing of the base model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import InputError, warn
from .encoder_config import PromptEncoderConfig, PromptEncoderReparameterizationType


class PromptEncoder(nn.Module):
    """Produces the embeddings of the virtual tokens.

    Args:
        config: needs ``num_virtual_tokens`` and ``token_dim``; ``num_transformer_submodules``
            counts as 1 and ``encoder_hidden_size`` as ``token_dim`` where they are not given.

    Shape:
        input ``(batch_size, total_virtual_tokens)``, indices of virtual tokens;
        output ``(batch_size, total_virtual_tokens, token_dim)``.

    Attributes:
        embedding: ``nn.Embedding(total_virtual_tokens, token_dim)``.
        lstm_head: ``nn.LSTM``, for the type ``LSTM`` outside inference mode.
        mlp_head: ``nn.Sequential``, for ``MLP`` and ``LSTM`` outside inference mode.
        residual_head: ``nn.Sequential``, for ``RESIDUAL``, whose output is added to its input.
        words: ``(m, token_dim)``, for ``MIXTURE``: the vectors E that are mixed; then
            ``embedding`` has W, ``nn.Embedding(total_virtual_tokens, m)``.
        token_dim, input_size, output_size, hidden_size: widths.
        total_virtual_tokens: virtual tokens times transformer submodules.
        unit: what a network's output is multiplied by, a power of two; 1 in the reference. It is no
            part of the state dict: what is saved is `weights`.
        encoder_type: a `PromptEncoderReparameterizationType`.

    Example:
        >>> config = PromptEncoderConfig(num_virtual_tokens=4, token_dim=8)
        >>> PromptEncoder(config).table().shape
        torch.Size([4, 8])
    """

    words: Tensor
    unit: float = 1.0

    def __init__(self, config: PromptEncoderConfig):
        super().__init__()
        for name in ("num_virtual_tokens", "token_dim"):
            if getattr(config, name) is None:
                raise InputError(f"the prompt encoder needs {name}; the configuration has none")
        assert config.num_virtual_tokens is not None and config.token_dim is not None
        self.token_dim: int = config.token_dim
        self.input_size = self.token_dim
        self.output_size = self.token_dim
        self.hidden_size: int = config.encoder_hidden_size or self.token_dim
        self.total_virtual_tokens: int = config.num_virtual_tokens * (
            config.num_transformer_submodules or 1
        )
        self.encoder_type = PromptEncoderReparameterizationType(
            config.encoder_reparameterization_type
        )
        mixes = self.encoder_type == PromptEncoderReparameterizationType.MIXTURE
        mixes = mixes and not config.inference_mode
        width = self.hidden_size if mixes else self.token_dim
        self.embedding = nn.Embedding(self.total_virtual_tokens, width)
        if config.inference_mode:
            return
        if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            self._build_lstm(config)
        elif self.encoder_type == PromptEncoderReparameterizationType.MLP:
            self._build_mlp(config)
        elif self.encoder_type == PromptEncoderReparameterizationType.RESIDUAL:
            self._build_residual()
        elif mixes:
            self._build_mixture()

    def _build_lstm(self, config: PromptEncoderConfig) -> None:
        self.lstm_head = nn.LSTM(
            self.input_size,
            self.hidden_size,
            num_layers=config.encoder_num_layers,
            dropout=config.encoder_dropout,
            bidirectional=True,
            batch_first=True,
        )
        width = 2 * self.hidden_size
        self.mlp_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.output_size)
        )

    def _build_mlp(self, config: PromptEncoderConfig) -> None:
        if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
            warn(
                # The reference's words, which its users' tests know; it counts hidden layers.
                "for MLP, the argument `encoder_num_layers` is ignored. Exactly 2 MLP layers are "
                "used."
            )
        self.mlp_head = nn.Sequential(
            nn.Linear(self.input_size, self.hidden_size),
            nn.ReLU(),
            nn.Linear(self.hidden_size, self.hidden_size),
            nn.ReLU(),
            nn.Linear(self.hidden_size, self.output_size),
        )

    def _build_residual(self) -> None:
        norm = nn.LayerNorm(self.token_dim)
        nn.init.zeros_(norm.weight)
        self.residual_head = nn.Sequential(
            nn.Linear(self.token_dim, self.hidden_size),
            nn.ReLU(),
            nn.Linear(self.hidden_size, self.token_dim),
            norm,
        )

    def _build_mixture(self) -> None:
        if self.hidden_size < self.total_virtual_tokens:
            raise InputError(
                f"encoder_hidden_size is {self.hidden_size}, the number of words in a mixture; "
                f"{self.total_virtual_tokens} virtual tokens need at least as many"
            )
        self.register_buffer("words", torch.randn(self.hidden_size, self.token_dim))
        with torch.no_grad():
            self.embedding.weight.copy_(torch.eye(*self.embedding.weight.shape))

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.embedding(indices)
        if hasattr(self, "words"):
            return hidden @ self.words
        if hasattr(self, "residual_head"):
            hidden = hidden + self.residual_head(hidden)
        if hasattr(self, "lstm_head"):
            hidden = self.lstm_head(hidden)[0]
        if hasattr(self, "mlp_head"):
            hidden = self.mlp_head(hidden)
        return hidden if self.unit == 1.0 else hidden * self.unit

    def table(self) -> Tensor:
        """All vectors ``(total_virtual_tokens, token_dim)``, computed once, in the encoder's own
        precision also where the model runs in a lower one."""
        device = self.embedding.weight.device
        indices = torch.arange(self.total_virtual_tokens, device=device)
        with torch.autocast(device.type, enabled=False):
            table: Tensor = self(indices.unsqueeze(0)).squeeze(0)
        return table

    def weights(self) -> dict[str, Tensor]:
        """The state dict of an encoder with the same output whose unit is 1: the reference's."""
        return self._with_output(self.state_dict(), self.unit)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` gave, here or of an encoder with another unit.

        Raises:
            RuntimeError: names or shapes are of another encoder.
        """
        self.load_state_dict(self._with_output(weights, 1 / self.unit))

    def _with_output(self, weights: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
        """Weights that make `factor` times as much, to the bit, since it is a power of two."""
        changed = dict(weights)
        if factor == 1.0:
            return changed
        factors = {"embedding.weight": factor}
        if hasattr(self, "residual_head"):  # whose network has the embedding as its input, too
            factors |= {"residual_head.3.weight": factor, "residual_head.3.bias": factor}
            factors["residual_head.0.weight"] = 1 / factor
        if hasattr(self, "mlp_head"):
            last = f"mlp_head.{len(self.mlp_head) - 1}"
            factors = {f"{last}.weight": factor, f"{last}.bias": factor}
        for name in factors.keys() & changed.keys():
            changed[name] = changed[name] * factors[name]
        return changed

    def _load_adapter_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Give the vectors of an adapter's state dict; the reference's own
        ``set_peft_model_state_dict``, which launchers call, asks for it when it has set the rest.
        """
        initialise(self, state_dict["prompt_embeddings"])


@torch.no_grad()
def initialise(encoder: PromptEncoder, vectors: Tensor, rows: Tensor | None = None) -> None:
    """Let the encoder's output at `rows` be `vectors`.

    Where the virtual tokens are trained themselves, alone or with a network beside them (new then),
    they become these, and in a mixture each of these rows is a word of its own. Elsewhere the last
    layer is linear in its input ``h``: the least change ``D`` of weight and bias with
    ``D [h; 1] = wanted - output`` for all rows at once comes from the pseudo-inverse. Rows that are
    not named keep their output. Exact while there are no more virtual tokens than the last layer
    has inputs, else the nearest in the least-squares sense.

    Args:
        encoder: changed in place.
        vectors: ``(len(rows), token_dim)``, the wanted outputs.
        rows: indices of virtual tokens, int64; by default all of them.
    """
    if rows is None:
        rows = torch.arange(len(vectors))
    vectors = vectors.to(encoder.embedding.weight)
    if hasattr(encoder, "words"):
        encoder.words[rows] = vectors
        weight = encoder.embedding.weight
        weight[rows] = torch.eye(*weight.shape).to(weight)[rows]
        return
    if hasattr(encoder, "residual_head"):  # what it has learnt to add goes into the others
        encoder.embedding.weight.copy_(encoder.table() / encoder.unit)
        for weight in encoder.residual_head[-1].parameters():
            weight.zero_()
    if not hasattr(encoder, "mlp_head"):
        encoder.embedding.weight[rows] = vectors / encoder.unit
        return
    training = encoder.training
    encoder.eval()
    last = encoder.mlp_head[-1]
    captured: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0][0]))
    try:
        output = encoder.table()
    finally:
        handle.remove()
        encoder.train(training)
    wanted = output.clone()
    wanted[rows] = vectors
    hidden = torch.cat([captured[0], torch.ones_like(captured[0][:, :1])], dim=1)
    # On the CPU, since not every device has double precision.
    change = torch.linalg.pinv(hidden.cpu().double()) @ (wanted - output).cpu().double()
    change /= encoder.unit
    last.weight += change[:-1].T.to(last.weight)
    last.bias += change[-1].to(last.bias)
