"""A real server from the package index scores, and its scores are compared with those of the same model in process.

Run: python -m venv server && server/bin/pip install 'torch==2.13.0' 'infinity-emb[server,torch]'
     python examples/real_server.py server/bin/infinity_emb FOLDER    (a cross-encoder with weights for torch)

Seen with infinity-emb 0.0.78 and ms-marco-MiniLM-L12-v2 in float32 on two cores: 400 pairs from -11.26 to 9.26 in 12
requests, the largest difference 4.5e-6.
"""

import socket
import subprocess
import sys
import time

import numpy as np

from st_wkl import CrossEncoderTeacher
from st_wkl.data import RemoteTeacher, ScoreStore, score_pairs

program, folder = sys.argv[1:3]
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
flags = f"--engine torch --device cpu --dtype float32 --no-bettertransformer --port {port} --url-prefix /v1"
server = subprocess.Popen([program, "v2", "--model-id", folder, "--served-model-name", "reranker", *flags.split()])
try:
    while server.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.5)
    teacher = RemoteTeacher(f"http://127.0.0.1:{port}", "reranker", revision="local", concurrency=4)
    print(teacher.identity)
    words = ["cats", "dogs", "birds", "like", "water", "grass", "meat", "fish", "purr", "bark", "sing", "swim"]
    chance = np.random.default_rng(0)
    texts = [" ".join(chance.choice(words, size)) for size in range(3, 43)]
    pairs = [(query, text) for query in texts[:10] for text in texts]
    with ScoreStore(":memory:") as store:
        found = score_pairs(teacher, pairs, store=store)
        expected = CrossEncoderTeacher(folder).score(pairs)
        print(f"{len(pairs)} pairs from {expected.min():.4f} to {expected.max():.4f}, {teacher.progress}")
        print(f"largest difference {np.abs(found - expected).max():.2e}")
finally:
    server.kill()
