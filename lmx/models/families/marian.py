"""Marian (Junczys-Dowmunt et al. 2018): BART with sinusoidal positions and no norm on embeddings; translators."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from lmx.models.config_map import ConfigMap, Reader
from lmx.models.families.bart import Bart, Function
from lmx.models.names import NameMap
from lmx.nn.embedding import Embedding, Positions, Sinusoidal


@dataclass(frozen=True)
class Marian(Bart):
    """The sizes of a Marian model; the defaults are those of the OPUS-MT models."""

    vocab: int = 58101
    """Tokens of the vocabulary, one for both languages; at least the tokenizer's."""
    context: int = 512
    """The longest sequence."""
    width: int = 512
    """Width of the residual stream."""
    encoder_layers: int = 6
    """Blocks of the encoder."""
    decoder_layers: int = 6
    """Blocks of the decoder."""
    encoder_heads: int = 8
    """Attention heads of the encoder."""
    decoder_heads: int = 8
    """Attention heads of the decoder."""
    encoder_hidden: int = 2048
    """Hidden units of the encoder's feed-forward layers."""
    decoder_hidden: int = 2048
    """Hidden units of the decoder's feed-forward layers."""
    activation: Function = "silu"
    """The feed-forward layers' function."""
    scaled: bool = True
    """Whether embeddings are multiplied by sqrt(width)."""
    decoder_start: int = 58100
    """The token that the decoder starts with: the padding."""

    family: ClassVar[str] = "marian"
    names: ClassVar[NameMap] = dataclasses.replace(
        Bart.names, ignored=(*Bart.names.ignored, "*.embed_positions.weight")
    )
    config_map: ClassVar[ConfigMap] = dataclasses.replace(
        Bart.config_map,
        defaults={"activation": "gelu", "scaled": False, "decoder_start": 58100},
        only={
            "tie_word_embeddings": True,
            "is_encoder_decoder": True,
            "share_encoder_decoder_embeddings": True,
            "normalize_before": False,
            "normalize_embedding": False,
            "add_final_layer_norm": False,
            "static_position_embeddings": True,
        },
        architectures={"token_prediction": "MarianMTModel", "embedding": "MarianModel"},
        ignored=(*Bart.config_map.ignored, "add_bias_logits", "extra_pos_embeddings", "bad_words_ids"),
    )

    def positions(self) -> Positions:
        """Sines and cosines."""
        return Sinusoidal("halves")

    def embedding(self, rows: int, **more: Any) -> Embedding:
        """Without a norm."""
        return super().embedding(rows, norm=None, **more)

    @classmethod
    def read_more(cls, config: Reader) -> dict[str, Any]:
        """Nothing more: the two languages share their vocabulary."""
        config.only("decoder_vocab_size", config.value("vocab_size"))
        return {}

    def write_more(self) -> dict[str, Any]:
        """The tokens that Marian's generation needs."""
        return {"pad_token_id": self.decoder_start, "eos_token_id": 0}


PRESETS = {"marian_opus_mt": Marian()}
"""The size of most OPUS-MT models; their vocabularies differ."""
