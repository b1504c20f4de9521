"""A model in ONNX format as a black box."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedzge_flwr import (
    OnnxBlackBox,
    export_onnx,
)
from fedzge_flwr.common.errors import ConfigError, DataError
from tests.helpers.boxes import QUERY, SHAPE, context_of
from tests.helpers.small_models import mlp


def test_an_onnx_model_answers_as_the_model_that_it_was(onnx_file: Path) -> None:
    model = mlp(SHAPE, 10)
    model.load_state_dict(torch.load(onnx_file.with_suffix(".pt"), weights_only=True))
    images = np.random.default_rng(2).uniform(-1, 1, (600, *SHAPE)).astype(np.float32)
    with torch.inference_mode():
        wanted = model(torch.from_numpy((images + 1) / 2)).numpy()
    box = OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50, prepare=lambda x: (x + 1) / 2)
    np.testing.assert_allclose(box.logits(images), wanted, atol=1e-5)
    assert box.logits(images[:0]).shape == (0, 10)


def test_an_onnx_model_of_one_batch_size_and_another_float_answers_any_number(
    tmp_path: Path,
) -> None:
    """As ``torch.onnx.export`` writes it unless it is told otherwise."""
    model = mlp(SHAPE, 10).double().eval()
    path = tmp_path / "fixed.onnx"
    torch.onnx.export(
        model, (torch.zeros(4, *SHAPE).double(),), str(path), dynamo=True, verbose=False
    )
    box = OnnxBlackBox(context_of(), path, SHAPE, 10, 50)
    for images in (QUERY, QUERY[:4], QUERY[:1], QUERY[:0]):
        with torch.inference_mode():
            wanted = model(torch.from_numpy(images).double()).float().numpy()
        found = box.logits(images)
        assert found.dtype == np.float32
        assert found.shape == (len(images), 10)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_images_that_an_onnx_model_does_not_take(onnx_file: Path) -> None:
    def flat(images: Any) -> Any:
        return images.reshape(len(images), -1)

    box = OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50, prepare=flat)
    with pytest.raises(
        DataError, match=r"'images' is tensor\(float\) of shape .*\(7, 64\)"
    ) as caught:
        box.logits(QUERY)
    assert "\n" not in str(caught.value)
    assert "prepare" in str(caught.value)


def test_bad_onnx_files(onnx_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    for _ in range(2):
        with pytest.raises(DataError, match="not an ONNX model that can be read") as caught:
            OnnxBlackBox(context_of(), bad, SHAPE, 10, 50)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"{bad}: ")
        bad.write_bytes(b"no model")
    box = OnnxBlackBox(context_of(), onnx_file, SHAPE, 7, 50)
    with pytest.raises(DataError, match=r"shape \(7, 10\) for 7 images and 7 classes"):
        box.logits(QUERY)


def test_an_onnx_model_that_ends_in_a_softmax(onnx_file: Path, tmp_path: Path) -> None:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(SHAPE, 10)
            self.inner.load_state_dict(torch.load(onnx_file.with_suffix(".pt")))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.inner(images), dim=1)

    path = tmp_path / "softmax.onnx"
    export_onnx(Softmax(), path, SHAPE)
    logits = OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50).logits(QUERY)
    found = OnnxBlackBox(context_of(), path, SHAPE, 10, 50, output="probabilities").logits(QUERY)
    wanted = torch.log_softmax(torch.from_numpy(logits), dim=1).clamp_min(np.log(1e-4)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    with pytest.raises(DataError, match="output 'logits' is no probabilities: it goes from -"):
        OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50, output="probabilities").logits(QUERY)


def test_the_output_of_an_onnx_model_by_name(onnx_file: Path, tmp_path: Path) -> None:
    """Converters of other libraries put the labels first."""
    whole = onnx.load(onnx_file)
    helper = onnx.helper
    whole.graph.node.append(helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0))
    whole.graph.output.insert(
        0, helper.make_tensor_value_info("label", onnx.TensorProto.INT64, [7])
    )
    path = tmp_path / "two.onnx"
    onnx.save(whole, path)
    wanted = OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50).logits(QUERY)
    found = OnnxBlackBox(context_of(), path, SHAPE, 10, 50, output_name="logits").logits(QUERY)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(DataError, match=r"'label' has shape \(7,\).* are label, logits: `out"):
        OnnxBlackBox(context_of(), path, SHAPE, 10, 50).logits(QUERY)
    with pytest.raises(ConfigError, match="output_name = 'logit': the ONNX model's outputs"):
        OnnxBlackBox(context_of(), path, SHAPE, 10, 50, output_name="logit")


def test_onnx_output_of_an_unknown_kind(onnx_file: Path) -> None:
    with pytest.raises(ConfigError, match="output = 'probs': give one of 'logits', 'prob"):
        OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50, output="probs")


def test_maps_as_converters_of_classifiers_write_them(onnx_file: Path, tmp_path: Path) -> None:
    """As skl2onnx does unless it is told otherwise."""
    whole, helper, types = onnx.load(onnx_file), onnx.helper, onnx.TensorProto
    whole.graph.node.append(
        helper.make_node(
            "ZipMap", ["logits"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=range(10)
        )
    )
    scores = helper.make_tensor_type_proto(types.FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(types.INT64, scores))
    whole.graph.output.insert(0, helper.make_value_info("maps", maps))
    whole.opset_import.append(helper.make_opsetid("ai.onnx.ml", 1))
    path = tmp_path / "maps.onnx"
    onnx.save(whole, path)
    with pytest.raises(DataError) as caught:
        OnnxBlackBox(context_of(), path, SHAPE, 10, 50).logits(QUERY)
    assert str(caught.value).startswith(
        "the ONNX model's output 'maps' is a sequence of maps: export it with zipmap=False"
    )
    found = OnnxBlackBox(context_of(), path, SHAPE, 10, 50, output_name="logits").logits(QUERY)
    assert found.shape == (7, 10)
