"""Config maps: how a family's numbers stand in a Hugging Face ``config.json``, as data."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lmx.config import nearest
from lmx.errors import UserError

Task = Literal[
    "token_prediction",
    "pretraining",
    "sequence_classification",
    "token_classification",
    "question_answering",
    "embedding",
]
"""What a model's heads are for; ``pretraining`` is BERT's: tokens and the next sentence."""

CLASSIFYING: tuple[Task, ...] = ("sequence_classification", "token_classification")
"""Tasks with as many outputs as there are classes."""

_HARMLESS = (
    "_attn_implementation _name_or_path add_cross_attention architectures attention_dropout "
    "attention_probs_dropout_prob "
    "attn_implementation attn_pdrop auto_map bos_token_id chunk_size_feed_forward classifier_dropout cls_token_id "
    "decoder_start_token_id dropout dropout_rate dtype embd_pdrop embedding_dropout eos_token_id finetuning_task "
    "forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label "
    "initializer_factor initializer_range init_std is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id "
    "mask_token_id max_length model_type num_labels output_attentions output_hidden_states output_past pad_token_id "
    "position_embedding_type prefix pretraining_tp problem_type quantization_config resid_pdrop return_dict "
    "sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj "
    "task_specific_params tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version "
    "unk_token_id use_bfloat16 use_cache"
)
HARMLESS = frozenset(_HARMLESS.split())
"""Keys that leave the computed function as it is (dropout is for training, and stays off unless asked for), or that
are read elsewhere."""


class Reader(Mapping[str, Any]):
    """A ``config.json`` that remembers which keys were looked at, so that no number is passed over in silence."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self._seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._seen.add(key)
        return self._config[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._config)

    def __len__(self) -> int:
        return len(self._config)

    def value(self, key: str, *default: Any) -> Any:
        """The value of a key; where it is absent or null, the default, if one is given.

        Raises:
          UserError: it is not there, and there is no default.
        """
        value = self.get(key)
        if value is None and not default:
            raise UserError(f"config.json lacks {key!r}, which a {self.get('model_type', 'model')} needs")
        return default[0] if value is None else value

    def only(self, key: str, supported: Any) -> None:
        """Raises UserError if the key is there with another value than the one that the family computes."""
        if self.get(key) not in (None, supported):
            raise UserError(
                f"config.json sets {key} to {self[key]!r}; {self.get('model_type', 'this family')} is supported with "
                f"{supported!r} only"
            )

    def unread(self) -> list[str]:
        """The keys that nobody looked at, with a value that could mean something."""
        return sorted(k for k, v in self._config.items() if k not in self._seen | HARMLESS and v not in (None, False))


@dataclass(frozen=True)
class ConfigMap:
    """A family's map.

    Attributes:
      keys: their key, by our field.
      defaults: transformers' defaults, by our field, for keys that a ``config.json`` may leave out; the others are
        required. None stands for null.
      only: options with the single value that the family computes, by their key; they may be absent, and are written.
      architectures: their class, by what its heads are for.
      ignored: more keys without a meaning for the computation.
      own: transformers has no such class; the format is of lmx alone.
    """

    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    architectures: Mapping[Task, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    own: bool = False

    def read(self, config: Reader) -> dict[str, Any]:
        """Our fields' values.

        Raises:
          UserError: a number that is missing, or an option that the family does not compute.
        """
        for key, supported in self.only.items():
            config.only(key, supported)
        given = {f: (self.defaults[f],) if f in self.defaults else () for f in self.keys}
        return {f: config.value(key, *given[f]) for f, key in self.keys.items()}

    def write(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of ``config.json`` for our fields' values: the inverse of :meth:`read`."""
        return {key: values[f] for f, key in self.keys.items()} | dict(self.only)

    def task(self, config: Mapping[str, Any]) -> Task:
        """What the heads of the checkpoint are for; token prediction where it does not say.

        Raises:
          UserError: an architecture that the family does not have.
        """
        names = config.get("architectures") or [next(iter(self.architectures.values()))]
        by_name = {name: task for task, name in self.architectures.items()}
        if names[0] not in by_name:
            raise UserError(f"config.json names the architecture {names[0]!r}, expected {nearest(names[0], by_name)}")
        return by_name[names[0]]

    def read_task(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields ``task`` and ``classes``: as many as there are labels, 2 where the file does not say."""
        task = self.task(config)
        classes = len(config.get("id2label") or ()) or config.get("num_labels") or 2
        return {"task": task, "classes": classes if task in CLASSIFYING else 2}

    def architecture(self, task: Task) -> str:
        """Their class for a task. Raises UserError if they have none."""
        if task not in self.architectures:
            raise UserError(
                f"there is no Hugging Face class of this family for {task}; it has {nearest(task, self.architectures)}"
            )
        return self.architectures[task]

    def warn_unread(self, config: Reader) -> None:
        """Warns of keys that nobody looked at."""
        unread = [key for key in config.unread() if key not in self.ignored]
        if unread:
            warnings.warn(
                f"config.json has keys that lmx does not know and passes over: {', '.join(unread)}", stacklevel=3
            )


def encoder_tasks(name: str) -> dict[Task, str]:
    """The architectures of an encoder-only family whose classes begin with ``name``."""
    return {**decoder_tasks(name), "token_prediction": f"{name}ForMaskedLM"}


def decoder_tasks(name: str, *missing: Task) -> dict[Task, str]:
    """The architectures of a decoder-only family whose classes begin with ``name``, but for the ``missing`` ones."""
    classes: dict[Task, str] = {
        "token_prediction": f"{name}ForCausalLM",
        "sequence_classification": f"{name}ForSequenceClassification",
        "token_classification": f"{name}ForTokenClassification",
        "question_answering": f"{name}ForQuestionAnswering",
        "embedding": f"{name}Model",
    }
    return {task: architecture for task, architecture in classes.items() if task not in missing}
