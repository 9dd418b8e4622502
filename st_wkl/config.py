"""Where `RunConfig` was; it is part of `st_wkl.pipeline`."""

from st_wkl.pipeline.options import RunConfig as RunConfig
