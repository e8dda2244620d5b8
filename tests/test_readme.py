"""The Python example of the README runs as it stands, on a small backbone."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

README = Path(__file__).parents[1] / "README.md"


def test_the_python_example(tiny_backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for written, here in (("path/or/hub-id", str(tiny_backbone)), ("factor=16", "factor=2")):
        assert written in code
        code = code.replace(written, here)
    before, after = code.split("# ... and after training:\n")
    names = {}
    exec(before, names)
    input_ids = jnp.array([[2, 10, 11, 3], [2, 15, 16, 3]])
    batch = (input_ids, jnp.ones_like(input_ids), jnp.array([1, 0]))
    losses = []
    for _ in range(8):
        names["trained"], names["opt_state"], loss = names["step"](
            names["trained"], names["opt_state"], *batch
        )
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    trained = names["trained"]
    exec(after, names)
    rule = names["params"]["phm_rule"]
    np.testing.assert_array_equal(rule, trained["phm_rule"])
    assert sorted(path.name for path in (tmp_path / "my-adapter").iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
    ]
