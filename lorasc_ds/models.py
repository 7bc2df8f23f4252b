"""Loading and saving Hugging Face models and tokenizers; the quickstart's model sits in the package."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lorasc_ds.algorithm.files import current_umask, sync
from lorasc_ds.config import ModelConfig
from lorasc_ds.errors import ConfigError

QUICKSTART = Path(__file__).parent / "quickstart"
QUICKSTART_BASE = QUICKSTART / "base"
EMBEDDED = {"quickstart": QUICKSTART_BASE, "quickstart-vit": QUICKSTART / "vit"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def source_of(config: ModelConfig) -> dict[str, Any]:
    """The arguments that every `from_pretrained` here takes."""
    return {
        "pretrained_model_name_or_path": str(EMBEDDED.get(config.name_or_path, config.name_or_path)),
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }


@contextmanager
def loading(what: str, config: ModelConfig) -> Iterator[None]:
    """Turns whatever a library raises over a folder or a hub id into one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"model.name_or_path {config.name_or_path}: {what} cannot be loaded: {reason}; give a hub id that can be"
            " reached, or a local folder with config.json, model.safetensors and a tokenizer"
        ) from error


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    with loading("the tokenizer", config):
        return AutoTokenizer.from_pretrained(**source_of(config))


Kind = Literal["text", "image_text", "classes"]
CLASSIFIER = "classifier."  # as transformers calls the last layer of a model of images


def has_text_tower(architecture: PretrainedConfig) -> bool:
    """Whether images and texts are embedded side by side, as CLIP does."""
    return type(architecture) in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING


def pools_last_position(architecture: PretrainedConfig) -> bool:
    """Whether the feature of a text is that of the last position, be it padding, as SigLIP learned it."""
    return architecture.model_type in ("siglip", "siglip2")


def kind_of(config: ModelConfig, architecture: PretrainedConfig) -> Kind:
    """What kind of model it is: as `model.kind` says, or the first that its configuration has."""
    if config.kind != "auto":
        return config.kind
    kind = type(architecture)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "text"
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return "image_text"
    classes = has_text_tower(architecture) or kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    return "classes" if classes else "text"  # or code that comes with the model, which says so itself


def load_image_processor(config: ModelConfig) -> Any:
    """Hugging Face's image processor of the model, on Pillow whatever is installed: its geometry is what is used."""
    with loading("its image processor", config):
        return AutoImageProcessor.from_pretrained(**source_of(config), backend="pil")


def load_beside(config: ModelConfig) -> list[Any]:
    """What belongs in the folder of such a model: tokenizer, image processor or both in one."""
    architecture = load_architecture(config)
    match kind_of(config, architecture):
        case "text":
            return [load_tokenizer(config)]
        case "image_text":
            return [load_processor(config)]
        case "classes":
            text = [load_tokenizer(config)] if has_text_tower(architecture) else []
            return [load_image_processor(config), *text]


def load_processor(config: ModelConfig) -> Any:
    """The processor of a vision-language model, on Pillow whatever is installed."""
    with loading("its processor", config):
        return AutoProcessor.from_pretrained(**source_of(config), backend="pil")


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ConfigError: there is none, or its weights are quantised.
    """
    with loading("its configuration", config):
        architecture = AutoConfig.from_pretrained(**source_of(config))
    if getattr(architecture, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.name_or_path {config.name_or_path} has quantised weights, which cannot be merged into:"
            " take the float32 or bfloat16 model"
        )
    if config.labels not in (None, architecture.num_labels) and not has_text_tower(architecture):
        architecture.num_labels = config.labels
    return architecture


def class_names(architecture: PretrainedConfig) -> tuple[str, ...]:
    """What a model of images calls the outputs of its classifier; () where they have but numbers."""
    named: Any = architecture.id2label or {}
    names = tuple(str(named[at]) for at in sorted(named))
    return () if names == tuple(f"LABEL_{at}" for at in range(len(names))) else names


def name_classes(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Name the outputs of a classifier in what `save_pretrained` writes; one with a text tower has none."""
    if names and not has_text_tower(model.config):
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: at for at, name in enumerate(names)}


def auto_class(config: ModelConfig, architecture: PretrainedConfig) -> Any:
    """What makes such a model in transformers."""
    match kind_of(config, architecture):
        case "text":
            return AutoModelForCausalLM
        case "image_text":
            return AutoModelForImageTextToText
        case "classes":
            return AutoModel if has_text_tower(architecture) else AutoModelForImageClassification


def load_shape(config: ModelConfig) -> PreTrainedModel:
    """The model on the meta device: all names and shapes, no weights read.

    Raises:
        ConfigError: there is none, or its weights are quantised.
    """
    architecture = load_architecture(config)
    with loading("the model", config), torch.device("meta"):
        return auto_class(config, architecture).from_config(
            architecture, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code
        )


def load_model(config: ModelConfig) -> PreTrainedModel:
    """The pretrained model in `model.dtype`, from safetensors only; a classifier of `model.labels` may be random.

    Raises:
        ConfigError: it cannot be loaded, or lacks weights.
    """
    architecture = load_architecture(config)
    new = config.labels is not None
    with loading("the model", config):
        loaded: Any = auto_class(config, architecture).from_pretrained(
            **source_of(config),
            config=architecture,
            dtype=DTYPES[config.dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=new,
        )
        model, report = loaded
        mismatched = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
        absent = sorted({*report["missing_keys"], *mismatched})
        absent = [key for key in absent if not (new and key.startswith(CLASSIFIER))]
        if absent:
            raise ConfigError(
                f"model.name_or_path {config.name_or_path}: {len(absent)} weights of {type(model).__name__} are not in"
                f" its files ({', '.join(absent[:3])}): they would be random; give a complete checkpoint"
                + (
                    ", or train a new classifier (launch/train.py, task.train_head true)"
                    if absent[0].startswith(CLASSIFIER)
                    else ""
                )
            )
    # ZeRO-3's loader keeps the renamings that no name of the files needed, too; reverted, they would make other names.
    if getattr(model, "_weight_conversions", None) is not None:
        model._weight_conversions = [one for one in model._weight_conversions if one.was_used()]
    return model


class PretrainedTensors:
    """The tensors in the safetensors files of a pretrained model, read from the disk one at a time, when asked for.

    Args:
        config: the model; floating-point tensors are cast to its dtype, as loading the model does.
        files: its safetensors files.
    """

    def __init__(self, config: ModelConfig, files: Sequence[str]) -> None:
        self.config = config
        opened = [safe_open(path, framework="pt") for path in files]
        self.files = {key: file for file in opened for key in list(file.keys())}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """As it is stored; None where the files have no such tensor."""
        return tuple(self.files[name].get_slice(name).get_shape()) if name in self.files else None

    def __call__(self, name: str) -> Tensor:
        """The tensor that is stored under `name`.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.files:
            raise ConfigError(
                f"model.name_or_path {self.config.name_or_path}: its files hold no {name}, which transformers renames"
                " at load; load the model once and give what save_pretrained makes of it"
            )
        with loading(name, self.config):
            tensor = self.files[name].get_tensor(name)
        return tensor.to(DTYPES[self.config.dtype]) if tensor.is_floating_point() else tensor


def pretrained_tensors(config: ModelConfig) -> PretrainedTensors:
    """Open the safetensors files of a local folder or a hub snapshot; no tensor is read yet.

    The result, called with a name as `save_pretrained` writes it (a ledger's are), gives that tensor in `model.dtype`.

    Raises:
        ConfigError: there are none, or they are damaged.
    """
    with loading("its safetensors files", config):
        source = source_of(config)
        name, revision = source["pretrained_model_name_or_path"], source["revision"]
        whole = cached_file(name, SAFE_WEIGHTS_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
        if whole is not None:
            return PretrainedTensors(config, [whole])
        index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
        return PretrainedTensors(config, get_checkpoint_shard_files(name, index, revision=revision)[0])


def refuse_bidirectional(config: ModelConfig, model: PreTrainedModel, logits: Callable[[Tensor], Tensor]) -> None:
    """Stop where another last token changes the logits before it.

    Args:
        logits: maps token ids (inputs, length) to (inputs, length, vocabulary), without dropout.

    Raises:
        ConfigError: it does.
    """
    one, other = logits(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]]) % model.config.get_text_config().vocab_size)[
        :, :-1
    ].float()
    if (one - other).abs().max() > 1e-3 * one.std():
        raise ConfigError(
            f"model.name_or_path {config.name_or_path}: {type(model).__name__} lets a token see the tokens after"
            " it, so the loss would be that of a copy; give a causal language model"
        )


def takes_attention_bias(model: PreTrainedModel) -> bool:
    """Whether the model can be told, token by token, what each token sees: all layers attend to all that stands before.

    Sliding windows, linear attention and state spaces cannot; `evaluation.check_layout` tries it on the live model.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        kinds == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and model.config._attn_implementation in ("sdpa", "eager")
        and "position_ids" in inspect.signature(model.forward).parameters
    )


def takes_sequences(model: PreTrainedModel) -> bool:
    """Whether the model hands attention what it is told of the sequences in a row, besides taking a bias."""
    return model._supports_attention_backend and model.config._attn_implementation == "sdpa"


def longest_sequence(model: PreTrainedModel) -> int | None:
    """Tokens that the model's positions allow; None where it sets no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def forward_parameters(model: PreTrainedModel) -> int:
    """Parameters that every token is multiplied by: all but the embedding, unless that is the head too."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return whole if tied else whole - cast(Tensor, model.get_input_embeddings().weight).numel()


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the embedding: every token id must be smaller."""
    return cast(Tensor, model.get_input_embeddings().weight).shape[0]


def save_model(
    model: PreTrainedModel,
    backbone: dict[str, Tensor],
    beside: Sequence[Any],
    directory: Path,
    check: Callable[[Path], None],
) -> None:
    """Write the backbone as a plain Hugging Face model; `directory` appears whole and checked, or not at all.

    Args:
        backbone: its tensors, whole, by name.
        beside: tokenizer and processors.
        check: raises if the files of the folder it is given are not right.
    """
    temporary = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=backbone)
    for one in beside:
        one.save_pretrained(temporary)
    check(temporary)
    for file in temporary.iterdir():
        file.chmod(0o666 & ~current_umask())  # safetensors writes 0600
        sync(file)
    if directory.exists():  # of the same run, which was continued
        shutil.rmtree(directory)
    temporary.rename(directory)


def read_weights(directory: Path, names: list[str]) -> dict[str, Tensor]:
    """Weights of a saved model, by their names in its safetensors files."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in set(names) & set(file.keys())}
    return found
