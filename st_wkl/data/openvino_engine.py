"""Exported cross-encoders on OpenVINO, Intel's runtime: no optimum, no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from st_wkl.data.backends import OnnxEngine, cores


class OpenVinoEngine(OnnxEngine):
    """A sequence-classification model as openvino_model.xml, or in ONNX form, which OpenVINO reads as well."""

    backend = "openvino"

    def _load(self, model: Path, device: str | None) -> set[str]:
        try:
            import openvino
        except ImportError as error:
            raise ImportError("The OpenVINO backend needs openvino: pip install st-wkl[openvino]") from error
        core = openvino.Core()
        name = (device or "cpu").upper()
        if name.split(".")[0] not in {found.split(".")[0] for found in core.available_devices}:
            raise ValueError(f"OpenVINO cannot use the device {device!r} here; it has {core.available_devices}.")
        # Its default is bfloat16 or float16 where the device multiplies in it; a teacher shall be exact.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
        if name == "CPU":
            settings["INFERENCE_NUM_THREADS"] = cores()
        self.session = core.compile_model(core.read_model(model), name, settings)
        return {value.any_name for value in self.session.inputs}

    def _run(self, features: dict[str, np.ndarray]) -> np.ndarray:
        # A request of its own for each call: two threads on one request are an error.
        output: np.ndarray = self.session.create_infer_request().infer(features)[0]
        return output
