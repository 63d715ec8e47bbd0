"""The sections of a configuration beside the methods: defaults, what they may be, and what they mean.

They stand apart from `paretoprune.settings`, which every search depends on: a word changed here runs no search again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from paretoprune.data.normalisations import NORMALISATIONS
from paretoprune.settings import SHARE, ComparedMethod, Latency, Method, Settings, meaning, setting

# A name that can stand in a path.
NAME = {
    "description": "a name that can stand in a path: letters, digits, _ . and -, and none of the folders that results "
    "use",
    "type": "string",
    "pattern": "^(?!(?:data|logs|benchmarks|report|dense|importance)$)[A-Za-z0-9_][A-Za-z0-9_.-]*$",
}
SIZE = {"oneOf": [{"type": "integer", "minimum": 1}, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}]}
SEEDS = {
    "type": "array",
    "minItems": 1,
    "uniqueItems": True,
    "items": {"type": "integer", "minimum": 0, "maximum": 2147483647},
}


def required(description: str, **rule: Any) -> Any:
    """A field that has no default."""
    return field(metadata=meaning(description, **rule))


def again(kind: type[Settings], name: str, default: Any) -> Any:
    """A field of a class above with another default."""
    return field(default=default, metadata=next(one for one in fields(kind) if one.name == name).metadata)


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """A dataset and a network that belong together."""

    dataset: str = required("a name under `datasets`", type="string")
    network: str = required("a name under `networks`", type="string")
    seeds: Sequence[int] | None = setting(None, "of this run alone, instead of the common `seeds`", **SEEDS)


@dataclass(frozen=True, kw_only=True)
class Augmentation(Settings):
    """How training images are varied."""

    crop: int = required("pixels of random shift", type="integer", minimum=0, maximum=128)
    flip: bool = required("whether half of the images are mirrored left to right", type="boolean")


# How each source of one's own data is read, in the words of `data.folders.ImageFolder` and `data.arrays.ArrayFile`.
OWN_KEYS = {
    "imagefolder": ("path", "image_size", "channels", "resize", "orientation", "value_range"),
    "npz": ("path", "layout", "value_range", "augmentation"),
    "safetensors": ("path", "layout", "value_range", "augmentation"),
}


@dataclass(frozen=True, kw_only=True)
class Dataset(Settings):
    """Images, signals or a table, and how they are divided."""

    source: str = required(
        "where images come from: known sets, a folder or archive of images, or a file of arrays (images, signals, "
        "tables)",
        enum=["digits", "cifar10", "cifar100", "fashion_mnist", *OWN_KEYS],
    )
    path: str | None = setting(
        None,
        "of an imagefolder: a directory with train/<class>/* and optionally test/<class>/* or val/<class>/*, or a tar "
        "or zip archive of one; of npz and safetensors: the file with arrays images and labels, or train_images, …",
        type="string",
        minLength=1,
    )
    image_size: int | None = setting(
        None,
        "of an imagefolder: side in pixels to which images are scaled and cropped; null where all have one size",
        type=["integer", "null"],
        minimum=4,
        maximum=1024,
    )
    resize: int | None = setting(
        None,
        "of an imagefolder: pixels that the shorter side is scaled to before a square of `image_size` is cut out of "
        "the centre, as torchvision does (256 and 224); null for `image_size`",
        type=["integer", "null"],
        minimum=4,
        maximum=1024,
    )
    channels: int | None = setting(None, "of an imagefolder: 3 for colour, 1 for grey", enum=[1, 3])
    orientation: str = setting(
        "keep",
        "of an imagefolder: whether images with an orientation tag stay as they are stored, as in torchvision, or are "
        "turned",
        enum=["keep", "apply"],
    )
    value_range: str | Sequence[float] = setting(
        "type",
        "of one's own images: what black and white are, where they have not 8 bits: the range of their type, the "
        "smallest and largest value of the dataset, or two numbers",
        oneOf=[
            {"enum": ["type", "data"]},
            {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        ],
    )
    layout: str | None = setting(
        None,
        "of npz and safetensors: where images and signals have their channels, or that images (n, height, width) have "
        "none; null where the shape says it",
        enum=["channels_first", "channels_last", "grey", None],
    )
    calibration: float = required(
        "images that statistics and repairs see, never their labels: a whole number, or a share of the training images",
        **SIZE,
    )
    search: float = required(
        "images that candidates are evaluated on: a whole number, or a share of the training images", **SIZE
    )
    test: float = required(
        "images that finished networks are measured on: a whole number, or a share; not used where the source has test "
        "images of its own",
        **SIZE,
    )
    augmentation: Augmentation = field(metadata=meaning("how training images are varied"))


@dataclass(frozen=True)
class Training(Settings):
    """How to train; together with `Augmentation`, the fields of `training.loop.Recipe`."""

    epochs: int = setting(30, "passes over the training images", type="integer", minimum=1)
    batch_size: int = setting(64, "images per step", type="integer", minimum=2)
    learning_rate: float = setting(0.05, "peak of the schedule", type="number", exclusiveMinimum=0)
    momentum: float = setting(0.9, "of SGD with Nesterov momentum", type="number", minimum=0, exclusiveMaximum=1)
    weight_decay: float = setting(0.0005, "L2 penalty on weights", type="number", minimum=0)
    warmup_epochs: float = setting(2, "epochs of linear increase before the cosine decay", type="number", minimum=0)
    label_smoothing: float = setting(
        0.0, "share of the target spread over all classes", type="number", minimum=0, exclusiveMaximum=1
    )


@dataclass(frozen=True, kw_only=True)
class Normalisation(Settings):
    """Mean and deviation of each channel."""

    mean: Sequence[float] = required("one value per channel", type="array", minItems=1, items={"type": "number"})
    std: Sequence[float] = required(
        "one positive value per channel", type="array", minItems=1, items={"type": "number", "exclusiveMinimum": 0}
    )


@dataclass(frozen=True, kw_only=True)
class Network(Settings):
    """A network, trained or to be trained."""

    architecture: str = required(
        "resnet8 … resnet110, a torchvision classifier, or package.module:function", type="string", minLength=1
    )
    arguments: Mapping[str, Any] = required("further keyword arguments of the constructor", type="object")
    checkpoint: str | None = required("file of trained weights, null to train", type=["string", "null"])
    checkpoint_key: str | None = setting(
        None,
        "dotted path to the weights in a checkpoint that holds several, for instance ema_state_dict; null takes those "
        "that fit, as trained before averaged ones",
        type=["string", "null"],
        minLength=1,
    )
    search_held_out: bool = setting(
        False,
        "true where the checkpoint was not trained on the search images, so that their labels can be trusted",
        type="boolean",
    )
    normalisation: Normalisation | str | None = field(
        metadata=meaning(
            f"of images scaled to [0, 1], per channel: {', '.join(NORMALISATIONS)}, or `mean` and `std`; null for the "
            "training images' own",
            type=["object", "string", "null"],
            pattern=f"^({'|'.join(NORMALISATIONS)})$",
        )
    )
    exclude: Sequence[str] = required(
        "shell patterns of weights that stay dense", type="array", items={"type": "string"}
    )
    training: Training = field(default_factory=Training, metadata=meaning("what differs from the common `training`"))


@dataclass(frozen=True)
class Importance(Settings):
    """How scores are computed."""

    images: int = setting(512, "training images whose gradients taylor and fisher use", type="integer", minimum=1)
    positions: int | None = setting(
        64,
        "output positions of each calibration image that layer statistics are taken over, null for all",
        type=["integer", "null"],
        minimum=1,
    )


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Training of chosen members with their mask fixed."""

    methods: Sequence[str] = required(
        "methods whose fronts are fine-tuned, some of `methods`",
        type="array",
        uniqueItems=True,
        items={"type": "string"},
    )
    sparsities: Sequence[float] = setting(
        [0.8, 0.9], "the members nearest to these are chosen", type="array", uniqueItems=True, items=SHARE
    )
    knee: bool = setting(True, "whether the knee of the front is chosen too", type="boolean")
    epochs: int = again(Training, "epochs", 6)
    learning_rate: float = again(Training, "learning_rate", 0.02)
    warmup_epochs: float = again(Training, "warmup_epochs", 1)
    distillation: float = setting(0.7, "weight of the dense network's answers in the loss", **SHARE)
    temperature: float = setting(2.0, "softens the answers of teacher and student", type="number", exclusiveMinimum=0)


@dataclass(frozen=True)
class Report(Settings):
    """How results are presented."""

    reference: str | None = setting(
        None,
        "method that the others are tested against, one of `methods`; null for the first of them",
        type=["string", "null"],
        minLength=1,
    )


@dataclass(frozen=True, kw_only=True)
class Configuration(Settings):
    """A whole configuration."""

    results_directory: str = setting(
        "results",
        "folder of all results, logs and the report, in the folder where snakemake is started unless it is absolute or "
        "begins with ~; no braces",
        type="string",
        minLength=1,
    )
    data_directory: str = setting(
        "data",
        "where downloads go and where relative paths of datasets and checkpoints start; lies like `results_directory`",
        type="string",
        minLength=1,
    )
    inputs_needed: bool = setting(
        True, "whether images and checkpoints must be there before anything starts", type="boolean"
    )
    gpus_per_job: int = setting(
        0, "GPUs that a computing step asks for, 0 for the CPU", type="integer", minimum=0, maximum=1
    )
    threads_per_search: int = setting(
        2, "processes of one thread that a search evaluates candidates with", type="integer", minimum=1
    )
    prefix_cache_mb: int = setting(
        1000, "memory (MB) for activations that candidates of Phase 2 continue from", type="integer", minimum=0
    )
    seeds: Sequence[int] = setting([0, 1], "one whole chain for each", **SEEDS)
    runs: Sequence[Run] = required(
        "pairs of a dataset and a network, each defined below", type="array", minItems=1, uniqueItems=True
    )
    datasets: Mapping[str, Dataset] = required("images by name")
    networks: Mapping[str, Network] = required("networks by name")
    training: Training = field(metadata=meaning("of dense networks that have no checkpoint"))
    importance: Importance = field(metadata=meaning("how scores are computed"))
    latency: Latency = field(
        default_factory=Latency, metadata=meaning("times of networks on this machine, for methods of kind channels")
    )
    search: Method = field(metadata=meaning("settings of every method that does not say otherwise"))
    methods: Sequence[str] = required(
        "what is compared, names under `method_settings`",
        type="array",
        minItems=1,
        uniqueItems=True,
        items={"type": "string"},
    )
    method_settings: Mapping[str, ComparedMethod] = required(
        "what each name stands for: its kind, and any setting of `search` that differs"
    )
    finetune: Finetune = field(metadata=meaning("training of chosen members with their mask fixed"))
    report: Report = field(default_factory=Report, metadata=meaning("how results are presented"))
