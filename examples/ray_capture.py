"""Capture on a Ray cluster, one task a GPU: `python examples/ray_capture.py ROWS TEACHER OUT TASKS [GPUS_A_TASK]`.

The three paths are on a disk that all nodes share. A task that dies is started again and goes on with the shards that
it had not finished; the cache is byte for byte the one that a single process makes.
"""

import sys

import ray


@ray.remote(max_retries=3)
def part(rows: str, teacher: str, out: str) -> bool:
    from sparsekd.capture import capture

    return capture(rows=rows, teacher=teacher, out=out) is not None  # a manifest, once nobody's shards are missing


if __name__ == "__main__":
    rows, teacher, out, tasks, *gpus = sys.argv[1:]
    running = []
    for rank in range(int(tasks)):
        shares = {"env_vars": {"RANK": str(rank), "WORLD_SIZE": tasks}}  # whose shards are whose, as torchrun says it
        options = {"num_gpus": float(*gpus or "1"), "runtime_env": shares}
        running.append(part.options(**options).remote(rows, teacher, out))
    print("complete" if any(ray.get(running)) else "shards are missing: run it again")
