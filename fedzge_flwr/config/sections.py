"""The sections of the settings: every key with its type, range, default and meaning.

A section is a concern: how the run goes, data, images, queries, training, distillation, and the
optimiser of all of them. Names of parts (models, ensembles, estimators …) are looked up where their
registries are, and not here; the two recipes alone are known. The paper's values are a preset:
``config/presets/paper.toml``.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fedzge_flwr.common.registry import lookup
from fedzge_flwr.common.text import same_name
from fedzge_flwr.images.spec import DATASETS, OWN, DatasetSpec


def kebab(name: str) -> str:
    """Return a field's name as users write it."""
    return name.replace("_", "-")


def _not_one(number: int) -> int:
    if number == 1:
        raise ValueError("give 0, or at least 2: batch norm has no variance in a batch of one")
    return number


def _waitable(seconds: float) -> float:
    if not seconds <= _MOST_SECONDS:
        raise ValueError(f"give at most {_MOST_SECONDS:.0e} seconds")
    return seconds


def _folder_name(name: str) -> str:
    """Return a run's name in the form of Unicode in which letters are one character each."""
    name = same_name(name)
    if not re.fullmatch(r"[\w.-]*", name):
        raise ValueError("give letters, digits, '_', '-' and '.' alone")
    if name in (".", ".."):
        raise ValueError("that is a folder which is there already; give a name")
    if len(name.encode()) > MOST_NAME_BYTES:
        raise ValueError(f"give at most {MOST_NAME_BYTES} bytes: file systems take 255")
    return name


def _place(path: str) -> str:
    if len(path.encode(errors="surrogateescape")) > _MOST_PATH_BYTES:
        raise ValueError(f"give at most {_MOST_PATH_BYTES} bytes")
    if any(unicodedata.category(character) == "Cc" for character in path):
        raise ValueError("give a path without control characters")
    return path


MOST_NAME_BYTES = 200
"""Of a run's name: beside the folder stand others whose names are longer."""

_MOST_PATH_BYTES = 4000
# What is below takes no more: PyTorch's counts and threads have 32 bits, a wait ends within 292
# years. A seed is hashed; that it is of 64 bits is Flower's.
_MOST_COUNT = 2**31 - 1
_MOST_SECONDS = 1e9

_MOST_SHARE = 1e9
"""Of a source of images: sums of shares stay finite."""

MIN_TRAINING_IMAGES = 2
"""Batch norm has no variance to normalise by in a batch of one."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0), AfterValidator(_waitable)]
SecondsOrNone = Annotated[float, Field(ge=0), AfterValidator(_waitable)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
# Batch norm has no variance in a batch of one.
NoneOrTwo = Annotated[int, Field(ge=0), AfterValidator(_not_one)]
PlaceOrNone = Annotated[str, AfterValidator(_place)]
Place = Annotated[str, Field(min_length=1), AfterValidator(_place)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class Section(BaseModel):
    """A frozen group of settings that takes no unknown key and converts no type."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=kebab, populate_by_name=True
    )

    @field_validator("*")
    @classmethod
    def _countable(cls, value: Any, field: ValidationInfo) -> Any:
        if isinstance(value, int) and value > _MOST_COUNT and field.field_name != "seed":
            raise ValueError(f"give at most {_MOST_COUNT}")
        return value


class RunSettings(Section):
    """How the run goes: rounds, sampling, evaluation, transport, patience, devices, output."""

    recipe: Literal["efficient", "paper"] = Field("efficient", description="the form of the round")
    num_server_rounds: Count = Field(12, description="rounds R")
    num_clients: Count = Field(10, description="clients of the federation, all told")
    fraction_train: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="fraction C of the clients that take part in a round"
    )
    min_clients: Count = Field(1, description="fewest clients that must answer in a round")
    too_few_clients: Literal["fail", "skip"] = Field(
        "fail", description="what to do with a round in which fewer than min-clients answer"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    output_dir: Place = Field(
        "~/fedzge-runs", description="folder in which each run makes a folder of its own"
    )
    run_name: Annotated[str, AfterValidator(_folder_name)] = Field(
        "", description="name of the run's folder; empty: date, time and data set"
    )
    checkpoint_every: CountOrNone = Field(
        1, description="rounds between two checkpoints of the server's state; 0: none are made"
    )
    resume: PlaceOrNone = Field(
        "", description="folder of a run that was stopped: go on from its newest checkpoint"
    )
    tensorboard: bool = Field(
        False, description="write TensorBoard's files into the run folder (extra tensorboard)"
    )
    eval_every: Count = Field(1, description="evaluate every so many rounds, and at the last")
    client_evaluation: Literal["test", "held-out", "off"] = Field(
        "test",
        description="what clients are evaluated on: the common test set (and their ensemble with "
        "them), a held-out part of their own data, or nothing",
    )
    server_evaluation: Literal["test", "off"] = Field(
        "test", description="what the central model is evaluated on"
    )
    transport: Literal["compact", "dense"] = Field(
        "compact",
        description="how a round travels. compact: images as bytes, perturbed copies made by the "
        "client, one exchange that holds an earlier round's targets and the query; dense: float32 "
        "throughout, an exchange each for training, query and distillation, as published",
    )
    catch_up_rounds: CountOrNone = Field(
        2,
        description="most missed rounds of local training that a client makes up for when it is "
        "next asked; 0 where clients miss rounds because they are slow",
    )
    exchange_timeout: Seconds = Field(3600.0, description="seconds to wait for replies")
    train_timeout: SecondsOrNone = Field(
        0.0, description="the same for local training and for whole rounds; 0: exchange-timeout"
    )
    query_timeout: SecondsOrNone = Field(
        0.0, description="the same for queries by themselves; 0: exchange-timeout"
    )
    distill_timeout: SecondsOrNone = Field(
        0.0, description="the same for distillation by itself; 0: exchange-timeout"
    )
    evaluate_timeout: SecondsOrNone = Field(
        0.0, description="the same for evaluation; 0: exchange-timeout"
    )
    node_timeout: Seconds = Field(
        300.0, description="seconds to wait for num-clients nodes, and then for their hellos"
    )
    quorum: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="part of the clients asked whose answers suffice: once they are there, the "
        "others are waited for grace-period seconds more; 1: all are waited for",
    )
    grace_period: SecondsOrNone = Field(
        60.0, description="seconds to wait for the others once a quorum has answered"
    )
    node_ids: Annotated[str, Field(pattern=r"^(\s*\d+:\d+\s*(,\s*\d+:\d+\s*)*)?$")] = Field(
        "",
        description="which node may be which client, as partition:node, comma-separated, e.g. "
        "0:8123,1:9456, with the ids of 'flwr supernode list'; a client that is not named is the "
        "node that first says so",
    )
    node_changes: Literal["refuse", "warn"] = Field(
        "refuse",
        description="whether a client whose node is gone may come back as another node. refuse: "
        "never, right where nodes have keys, since Flower keeps their ids; warn: yes, with a "
        "warning, for nodes without keys, whose ids change at each start",
    )
    data_changes: Literal["refuse", "warn"] = Field(
        "refuse",
        description="whether a run that is resumed, or a client that comes back, may have other "
        "images than before. refuse: no; warn: yes, with a warning",
    )
    server_device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    server_threads: CountOrNone = Field(
        2, description="torch threads of the server; 0: as many as torch has already"
    )
    client_device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    client_threads: Count = Field(1, description="torch threads of a client")

    @model_validator(mode="after")
    def _enough_participants(self) -> RunSettings:
        if self.min_clients > self.participants:
            raise ValueError(
                f"'min-clients' = {self.min_clients}, but 'fraction-train' = {self.fraction_train} "
                f"of 'num-clients' = {self.num_clients} is {self.participants} a round"
            )
        return self

    @model_validator(mode="after")
    def _one_node_a_client(self) -> RunSettings:
        pairs = self._node_pairs()
        partitions, nodes = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        for name, values in (("partition", partitions), ("node", nodes)):
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"'node-ids' names {name} {twice[0]} twice; name each once")
        if partitions and max(partitions) >= self.num_clients:
            raise ValueError(
                f"'node-ids' names partition {max(partitions)}, but 'num-clients' = "
                f"{self.num_clients}: the first is 0"
            )
        return self

    def _node_pairs(self) -> list[tuple[int, int]]:
        pairs = [item.split(":") for item in self.node_ids.split(",") if item]
        return [(int(partition), int(node)) for partition, node in pairs]

    @property
    def node_of(self) -> dict[int, int]:
        """The nodes that ``node-ids`` names, by partition."""
        return dict(self._node_pairs())

    @property
    def participants(self) -> int:
        """Clients sampled in a round: max(⌈C·clients⌉, 1)."""
        # A product that is whole but for floating point (0.07 · 100) is not rounded up.
        return max(math.ceil(round(self.fraction_train * self.num_clients, 9)), 1)


class DataSettings(Section):
    """The data set and how it is divided among the clients."""

    dataset: str = Field(
        "digits",
        description=f"one of {', '.join(DATASETS)}; {OWN}: each client has images of its own",
    )
    image_shape: Annotated[str, Field(pattern=r"^([1-9]\d{0,3},[1-9]\d{0,3},[1-9]\d{0,3})?$")] = (
        Field("", description=f"channels, height and width of the images of '{OWN}', e.g. 3,48,64")
    )
    num_classes: CountOrNone = Field(0, description=f"classes of '{OWN}'")
    data_dir: Place = Field(
        "~/fedzge-data", description="folder of the data set's files (digits needs none)"
    )
    download: bool = Field(False, description="fetch missing files (through torchvision)")
    num_train_images: Annotated[int, Field(ge=0)] = Field(
        0, description="training images to use, of all clients together; 0: all"
    )
    num_test_images: Annotated[int, Field(ge=0)] = Field(
        0, description="test images to use; 0: all"
    )
    partition: Literal["dirichlet", "iid", "pathological"] = Field(
        "dirichlet",
        description="how the training images are divided; pathological: each client has "
        "classes-per-client classes",
    )
    classes_per_client: Count = Field(2, description="classes of a client's pathological partition")
    alpha: Positive = Field(1.0, description="concentration of the Dirichlet partition")
    min_partition_size: Annotated[int, Field(ge=0)] = Field(
        10,
        description="the Dirichlet partition is drawn again until each client has so many images",
    )
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="part of a client's own images kept for client-evaluation = 'held-out'"
    )

    @model_validator(mode="after")
    def _own_images_are_declared(self) -> DataSettings:
        declared = bool(self.image_shape), self.num_classes > 1
        if self.dataset == OWN and not all(declared):
            raise ValueError(
                f"'dataset' = '{OWN}' needs 'image-shape', e.g. \"3,48,64\", and 'num-classes', at "
                "least 2"
            )
        if self.dataset != OWN and (self.image_shape or self.num_classes):
            raise ValueError(
                f"'image-shape' and 'num-classes' are those of {self.dataset}; leave them out, or "
                f"set 'dataset' = '{OWN}'"
            )
        return self

    @property
    def spec(self) -> DatasetSpec:
        """Classes and image shape of the data set.

        Raises
        ------
        ConfigError
            If there is no such data set.
        """
        if self.dataset != OWN:
            return lookup(DATASETS, self.dataset, "data set")
        channels, height, width = map(int, self.image_shape.split(","))
        return DatasetSpec(self.num_classes, (channels, height, width))


class ImageSettings(Section):
    """What the ensemble is asked about, and the generator that makes a part of it.

    The paper's round asks about generated images alone.
    """

    synthetic_batch_size: Annotated[int, Field(ge=2)] = Field(
        2200, description="new images N a round, perturbed copies not counted"
    )
    generator_share: NonNegative = Field(
        0.0, description="part of a round's images that the generator makes; 0: none"
    )
    image_sources: str = Field(
        "evolved:1,patterns:1,bred:1,procedural:1",
        description="where the other images come from, as source:share, comma-separated; the "
        'shares are relative, generator-share among them; "": all are generated',
    )
    surprise_power: NonNegative = Field(
        3.0,
        description="power by which sources are favoured whose answers surprise the central model; "
        "0: their shares are as given",
    )
    candidates: Count = Field(
        3,
        description="images of a source drawn for each one that is asked about, of which "
        "the central model's classes choose; 1: no choice",
    )
    generator: str = Field(
        "conditional",
        description="images from noise and a label, or from noise alone ('unconditional')",
    )
    generator_width: Count = Field(32, description="width ngf of the generator")
    latent_dim: Count = Field(100, description="dimension nz of the generator's noise")
    generator_lr: Positive = Field(1e-3, description="learning rate of the generator")
    generator_steps: CountOrNone = Field(
        10, description="generator steps a round through the central model, free of queries"
    )
    objective: str = Field("fedzge", description="what the generator minimises")
    beta1: NonNegative = Field(1.0, description="weight of the adversarial term")
    beta2: NonNegative = Field(1.0, description="weight of the diversity term")
    beta3: NonNegative = Field(1.0, description="weight of the information term")

    @model_validator(mode="after")
    def _images_from_somewhere(self) -> ImageSettings:
        if not (self.source_shares or self.generator_share):
            raise ValueError("'generator-share' or a share of 'image-sources' must be above 0")
        return self

    @property
    def source_shares(self) -> dict[str, float]:
        """Shares above 0 by source, in the order given.

        Raises
        ------
        ValueError
            If they are not written as source:share, each source once.
        """
        pairs = [pair.partition(":") for pair in self.image_sources.split(",") if pair.strip()]
        shares: dict[str, float] = {}
        for name, _, share in pairs:
            try:
                value = float(share)
            except ValueError:
                value = math.nan
            if not name.strip() or name.strip() in shares or not 0 <= value <= _MOST_SHARE:
                raise ValueError(
                    f"'image-sources' = '{self.image_sources}': give source:share, each source "
                    f"once and its share in 0 … {_MOST_SHARE:.0f}, e.g. "
                    '"evolved:0.5,patterns:0.5"'
                )
            shares[name.strip()] = value
        return {name: share for name, share in shares.items() if share}


class QuerySettings(Section):
    """How the ensemble is asked, and how its answers combine."""

    estimator: str = Field("guided", description="zeroth-order estimator")
    directions: str = Field("rademacher", description="distribution of the random directions")
    differences: Literal["forward", "central"] = Field(
        "forward", description="slopes from one side, or from both for twice the queries"
    )
    q: Count = Field(2, description="directions per image")
    eps: Positive = Field(0.1, description="step ε along a direction")
    surrogate_shift: Annotated[int, Field(ge=0)] = Field(
        1,
        description="pixels by which images are moved each way to average the central model's "
        "gradients, for estimators that use them; 0: not at all",
    )
    gradient_batch_size: Count = Field(
        16,
        description="images that the central model differentiates at once for an estimate: fewer "
        "take less memory and, but for the last bits, give the same",
    )
    ensemble: str = Field("robust-contrasts", description="how clients' answers combine")
    answer_temperature: Positive = Field(
        2.0,
        description="divides clients' logits before they are combined for the central model and "
        "the generator; clients distill the combined answers as they are",
    )
    query_batch_size: Count = Field(500, description="images that a client evaluates at once")

    @property
    def softening(self) -> float:
        """By what the central model's answers are divided: ensemble "mean" softens none."""
        return 1.0 if self.ensemble == "mean" else self.answer_temperature


class TrainingSettings(Section):
    """How a client trains its own model on its own images."""

    local_models: str = Field(
        "cnn", description="one model for all clients, or one per partition, comma-separated"
    )
    local_epochs: Count = Field(2, description="epochs E1 of local training a round")
    local_rounds: CountOrNone = Field(
        6,
        description="rounds in which a client trains on its own images, the first that it takes "
        "part in; after them it only distills, and answers the same question in the same way; 0: "
        "all rounds",
    )
    min_local_steps: CountOrNone = Field(
        100, description="optimiser steps of local training below which epochs are added"
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="batch of local training")
    local_lr: Positive = Field(2e-3, description="learning rate of local training")
    logit_adjustment: bool = Field(
        True, description="local training corrects for the client's own class frequencies"
    )
    mixup: bool = Field(
        True, description="local training mixes pairs of images and of their labels"
    )
    random_shifts: bool = Field(
        True, description="local training moves images by up to a fourteenth of their sides"
    )
    random_erasing: bool = Field(
        True, description="local training covers a ninth of every second image by one colour"
    )

    def model_of(self, partition: int) -> str:
        """Return the name of the model of a partition."""
        names = self.model_names
        return names[partition] if len(names) > 1 else names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """The models' names: one for all clients, or one per partition."""
        return tuple(name.strip() for name in self.local_models.split(","))


class DistillationSettings(Section):
    """What is learned from the answers, at the server and at the clients."""

    temperature: Positive = Field(1.5, description="temperature T")
    central_model: str = Field("cnn", description="model that the server distills into")
    central_distill_steps: Count = Field(
        450,
        description="distillation steps E2 a round of the central model; with a memory on average, "
        "each round's in proportion to the answers that are kept by then",
    )
    central_lr: Positive = Field(2e-3, description="learning rate of central distillation")
    memory_size: NoneOrTwo = Field(
        100_000,
        description="past images and answers kept for distillation, of images at most 4 GB; 0: no "
        "memory",
    )
    client_distill_rounds: CountOrNone = Field(
        2,
        description="rounds in which a client distills, at the end of the run, on average: so many "
        "÷ fraction-train of the run's last rounds; 0: all rounds",
    )
    client_distill_steps: CountOrNone = Field(
        150, description="distillation steps a round at the clients; 0: clients never distill"
    )
    client_distill_lr: Positive = Field(4e-3, description="learning rate of client distillation")
    client_distill_max_norm: NonNegative = Field(
        1.0,
        description="norm to which the gradient of a step of client distillation is cut; 0: not at "
        "all",
    )
    client_rehearsal: bool = Field(
        True,
        description="clients go on telling apart own images, of the classes that they have, while "
        "they distill",
    )
    distill_batch_size: NoneOrTwo = Field(
        64, description="images a distillation step, at server and clients; 0: the full batch"
    )
    class_balance: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5,
        description="how far distillation, at server and clients, evens out the classes of the "
        "answers: 0 not at all, 1 wholly",
    )


class OptimizerSettings(Section):
    """How models are trained: locally, in both distillations, and the generator."""

    optimizer: Literal["adam", "sgd"] = Field("adam", description="optimiser")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of SGD")
    weight_decay: NonNegative = Field(5e-4, description="weight decay of SGD")
    lr_schedule: Literal["cosine", "step", "none"] = Field(
        "cosine",
        description="schedule over a phase; over the run for the generator and, in the efficient "
        "recipe, the central model",
    )
    lr_step_size: Count = Field(
        5, description="epochs between steps; rounds where the schedule spans the run"
    )
    lr_gamma: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="factor of the learning rate at each step"
    )
    training_precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="what models multiply in while they train or distill; answers are always in "
        "float32. bfloat16 halves the time of a small CNN on images of 28 pixels on processors "
        "that multiply it (AMX), and can cost time elsewhere",
    )


class Settings(BaseModel):
    """All settings of a run, by section; made by `make_settings` or `from_run_config`.

    Parameters
    ----------
    run : RunSettings
        How the run goes: rounds, sampling, evaluation, transport, patience, devices, output.
    data : DataSettings
        The data set and how it is divided.
    images : ImageSettings
        What the ensemble is asked about, and the generator.
    queries : QuerySettings
        How it is asked, and how its answers combine.
    training : TrainingSettings
        How a client trains its own model.
    distillation : DistillationSettings
        What server and clients learn from the answers.
    optimizer : OptimizerSettings
        The optimisers of all parts, and their schedules.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    images: ImageSettings = ImageSettings()
    queries: QuerySettings = QuerySettings()
    training: TrainingSettings = TrainingSettings()
    distillation: DistillationSettings = DistillationSettings()
    optimizer: OptimizerSettings = OptimizerSettings()

    @model_validator(mode="after")
    def _one_model_per_client(self) -> Settings:
        num_models = len(self.training.model_names)
        if num_models not in (1, self.run.num_clients):
            raise ValueError(
                f"'local-models' names {num_models} models for 'num-clients' = "
                f"{self.run.num_clients}; name one for all or one per client"
            )
        return self

    def to_run_config(self) -> dict[str, Any]:
        """Return the flat kebab-case mapping that `from_run_config` reads."""
        return {
            key: value
            for section in self.model_dump(by_alias=True).values()
            for key, value in section.items()
        }
