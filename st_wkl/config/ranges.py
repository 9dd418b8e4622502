"""Moved to `st_wkl.ranges`."""

from st_wkl.ranges import NO_LIMIT, RANGES, Range, check_arguments, check_options

__all__ = ["NO_LIMIT", "RANGES", "Range", "check_arguments", "check_options"]
