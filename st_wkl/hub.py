"""The Hub is in `st_wkl.publish.hub`; this name stays for one release."""

from st_wkl.publish.hub import push, push_dataset, push_student

__all__ = ["push", "push_dataset", "push_student"]
