"""Where exact search was; see `st_wkl.data.candidates` and `st_wkl.data.search`."""

from st_wkl.data.candidates import retriever_candidates as retriever_candidates
from st_wkl.data.search import exact_top_k as exact_top_k
