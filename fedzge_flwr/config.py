"""The settings of a run: one frozen, validated view of Flower's run config.

Every key is kebab-case and flat; `from_run_config` sorts the keys into the sections that the parts
of the system take. What the published commands set has their value for a default, except for the
data set, the models, the number of rounds and the output folder, which suit a quick first run.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fedzge_flwr.datasets_spec import DATASETS, DatasetSpec
from fedzge_flwr.errors import ConfigError
from fedzge_flwr.models import MODELS
from fedzge_flwr.registry import lookup


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _known_model(name: str) -> str:
    lookup(MODELS, name, "model")
    return name


def _known_dataset(name: str) -> str:
    lookup(DATASETS, name, "data set")
    return name


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
ModelName = Annotated[str, AfterValidator(_known_model)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=_kebab, populate_by_name=True
    )


class RunSettings(_Section):
    """How the run goes: rounds, sampling, evaluation, patience, output."""

    recipe: Literal["paper"] = Field("paper", description="the form of the round")
    num_server_rounds: Count = Field(30, description="rounds R")
    num_clients: Count = Field(10, description="clients of the federation, all told")
    fraction_train: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="fraction C of the clients that take part in a round"
    )
    min_clients: Count = Field(1, description="fewest clients that must answer in a round")
    too_few_clients: Literal["fail", "skip"] = Field(
        "fail", description="what to do with a round in which fewer than min-clients answer"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed of everything random")
    output_dir: Annotated[str, Field(min_length=1)] = Field(
        "~/fedzge-runs", description="folder in which each run makes a folder of its own"
    )
    run_name: Annotated[str, Field(pattern=r"^[\w.-]*$")] = Field(
        "", description="name of the run's folder; empty: date, time and data set"
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
    exchange_timeout: Positive = Field(3600.0, description="seconds to wait for replies")
    node_timeout: Positive = Field(300.0, description="seconds to wait for num-clients nodes")
    server_device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    server_threads: Count = Field(2, description="torch threads of the server")

    @model_validator(mode="after")
    def _enough_participants(self) -> RunSettings:
        if self.min_clients > self.participants:
            raise ValueError(
                f"'min-clients' = {self.min_clients}, but 'fraction-train' = {self.fraction_train} "
                f"of 'num-clients' = {self.num_clients} is {self.participants} a round"
            )
        return self

    @property
    def participants(self) -> int:
        """Clients sampled in a round: max(⌈C·clients⌉, 1)."""
        # A product that is whole but for floating point (0.07 · 100) is not rounded up.
        return max(math.ceil(round(self.fraction_train * self.num_clients, 9)), 1)


class DataSettings(_Section):
    """The data set and how it is divided among the clients."""

    dataset: Annotated[str, AfterValidator(_known_dataset)] = Field(
        "digits", description=f"one of {', '.join(DATASETS)}"
    )
    data_dir: Annotated[str, Field(min_length=1)] = Field(
        "~/fedzge-data", description="folder of the data set's files (digits needs none)"
    )
    download: bool = Field(False, description="fetch missing files (through torchvision)")
    num_train_images: Annotated[int, Field(ge=0)] = Field(
        0, description="training images to use, of all clients together; 0: all"
    )
    num_test_images: Annotated[int, Field(ge=0)] = Field(
        0, description="test images to use; 0: all"
    )
    partition: Literal["dirichlet", "iid"] = Field(
        "dirichlet", description="how the training images are divided"
    )
    alpha: Positive = Field(1.0, description="concentration of the Dirichlet partition")
    min_partition_size: Annotated[int, Field(ge=0)] = Field(
        10,
        description="the Dirichlet partition is drawn again until each client has so many images",
    )
    holdout_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="part of a client's own images kept for client-evaluation = 'held-out'"
    )

    @property
    def spec(self) -> DatasetSpec:
        """Classes and image shape of the data set."""
        return DATASETS[self.dataset]


class OptimizerSettings(_Section):
    """The optimiser and schedule of local training, both distillations and the generator."""

    optimizer: Literal["adam", "sgd"] = Field("adam", description="optimiser")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of SGD")
    weight_decay: NonNegative = Field(5e-4, description="weight decay of SGD")
    lr_schedule: Literal["cosine", "step", "none"] = Field(
        "cosine", description="schedule over a phase (the generator's: over the run)"
    )
    lr_step_size: Count = Field(5, description="epochs (generator: rounds) between steps")
    lr_gamma: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="factor of the learning rate at each step"
    )


class ClientSettings(_Section):
    """What a client does with its own model."""

    local_models: str = Field(
        "cnn", description="one model for all clients, or one per partition, comma-separated"
    )
    local_epochs: Count = Field(10, description="epochs E1 of local training a round")
    batch_size: Annotated[int, Field(ge=2)] = Field(256, description="batch of local training")
    local_lr: Positive = Field(0.01, description="learning rate of local training")
    client_distill_steps: Annotated[int, Field(ge=0)] = Field(
        3, description="full-batch distillation steps a round; 0: clients never distil"
    )
    client_distill_lr: Positive = Field(2e-5, description="learning rate of client distillation")
    query_batch_size: Count = Field(500, description="images that a client evaluates at once")
    client_device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    client_threads: Count = Field(1, description="torch threads of a client")

    @field_validator("local_models")
    @classmethod
    def _known_models(cls, names: str) -> str:
        for name in names.split(","):
            _known_model(name.strip())
        return names

    def model_of(self, partition: int) -> str:
        """Return the name of the model of a partition."""
        names = [name.strip() for name in self.local_models.split(",")]
        return names[partition] if len(names) > 1 else names[0]


class ServerSettings(_Section):
    """Generator, zeroth-order queries and central distillation."""

    central_model: ModelName = Field("cnn", description="model that the server distils into")
    central_distill_steps: Count = Field(10, description="full-batch distillation steps E2 a round")
    central_lr: Positive = Field(0.01, description="learning rate of central distillation")
    generator_lr: Positive = Field(1e-3, description="learning rate of the generator")
    generator_width: Count = Field(64, description="width ngf of the generator")
    latent_dim: Count = Field(100, description="dimension nz of the generator's noise")
    synthetic_batch_size: Annotated[int, Field(ge=2)] = Field(
        500, description="images N generated a round"
    )
    temperature: Positive = Field(5.0, description="temperature T")
    beta1: NonNegative = Field(1.0, description="weight of the adversarial term")
    beta2: NonNegative = Field(1.0, description="weight of the diversity term")
    beta3: NonNegative = Field(1.0, description="weight of the information term")
    estimator: Literal["batch-difference", "per-image", "guided", "surrogate"] = Field(
        "batch-difference", description="zeroth-order estimator"
    )
    directions: Literal["sphere", "rademacher"] = Field(
        "sphere", description="distribution of the random directions"
    )
    differences: Literal["forward", "central"] = Field(
        "forward", description="slopes from one side, or from both for twice the queries"
    )
    q: Count = Field(5, description="directions per image")
    eps: Positive = Field(1e-3, description="step ε along a direction")
    surrogate_shift: Annotated[int, Field(ge=0)] = Field(
        1,
        description="pixels by which images are moved each way to average the central model's "
        "gradients, for estimators that use them; 0: not at all",
    )

    @property
    def copies(self) -> int:
        """Queries per image, as the estimator's own ``copies`` (which a client need not build)."""
        if self.estimator == "surrogate":
            return 1
        return 1 + self.q * (2 if self.differences == "central" else 1)

    @property
    def max_query_images(self) -> int:
        """Images in the largest query message: N and all their perturbed copies."""
        return self.copies * self.synthetic_batch_size


class Settings(BaseModel):
    """All settings of a run, by section."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    client: ClientSettings = ClientSettings()
    server: ServerSettings = ServerSettings()

    @model_validator(mode="after")
    def _one_model_per_client(self) -> Settings:
        num_models = len(self.client.local_models.split(","))
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


def _sections() -> dict[str, type[_Section]]:
    return {
        "run": RunSettings,
        "data": DataSettings,
        "optimizer": OptimizerSettings,
        "client": ClientSettings,
        "server": ServerSettings,
    }


def from_run_config(run_config: Mapping[str, object]) -> Settings:
    """Parse Flower's run config.

    Parameters
    ----------
    run_config : Mapping[str, object]
        Flat mapping from kebab-case key to value; a key that is absent takes its default.

    Raises
    ------
    ConfigError
        On an unknown key, a value of the wrong type or out of range, or settings that contradict
        one another; one line that names the key and what is allowed.
    """
    sections = _sections()
    owner = {
        _kebab(field): name for name, section in sections.items() for field in section.model_fields
    }
    by_section: dict[str, dict[str, object]] = {name: {} for name in sections}
    for key, value in run_config.items():
        if key not in owner:
            close = difflib.get_close_matches(key, owner, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigError(f"run config: unknown key '{key}': {hint}known: {', '.join(owner)}")
        by_section[owner[key]][key] = value
    try:
        return Settings(
            **{name: sections[name].model_validate(by_section[name]) for name in sections}
        )
    except ValidationError as error:
        raise ConfigError(f"run config: {_one_line(error)}") from None


def _one_line(error: ValidationError) -> str:
    """Tell the first problem that pydantic found in one line, with the key as the user wrote it."""
    problem = error.errors(include_url=False)[0]
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not problem["loc"]:
        return message
    shown = repr(problem["input"])
    return f"'{problem['loc'][0]}' = {shown}: {message[0].lower()}{message[1:]}"
