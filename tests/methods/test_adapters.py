"""Compares bottlenecks with the paper's equations in float64 NumPy, and with AdapterHub."""

import numpy as np
import pytest

from compacter_jax.methods.compacter import PHMBottleneckConfig
from tests.helpers import (
    KNOBS,
    WIDTH,
    Model,
    assert_equal_to_rounding,
    expected_gradients,
    expected_output,
    method_of,
    output_and_gradients,
    random_params,
    random_states,
)


@pytest.mark.parametrize("knob", KNOBS)
def test_output_and_gradients_equal_the_equations(knob):
    config = method_of(knob)
    params = random_params(Model(config), seed=1)
    x, cotangent = random_states(2), random_states(3)
    exact = {path: np.float64(value) for path, value in params.items()}
    assert_equal_to_rounding(
        output_and_gradients(Model(config), params, x, cotangent),
        (
            expected_output(config, exact, np.float64(x)),
            expected_gradients(config, params, x, cotangent),
        ),
    )


def adapterhub_adapter(config, params):
    """Returns AdapterHub's module in float64 with our parameters.

    Returns:
      The module, its parameters by our paths, and the shared tensors by AdapterHub's names.
    """
    torch = pytest.importorskip("torch")
    adapters = pytest.importorskip("adapters")
    from adapters.methods.modeling import Adapter

    phm = isinstance(config, PHMBottleneckConfig)
    settings = {
        "reduction_factor": config.reduction_factor,
        "non_linearity": config.non_linearity,
        "scaling": config.scaling,
        "ln_before": config.layer_norm_before,
        "ln_after": config.layer_norm_after,
        "phm_layer": phm,
    }
    if phm:
        same = ("phm_dim", "phm_rank", "factorized_phm_W", "shared_phm_rule")
        same += ("factorized_phm_rule", "shared_W_phm")
        settings |= {name: getattr(config, name) for name in same}
    hub = adapters.BnConfig(mh_adapter=True, output_adapter=True, **settings)
    module = Adapter("a", WIDTH, config.bottleneck_width(WIDTH), hub).double()

    layers = {
        "adapter/down": f"adapter_down.{int(config.layer_norm_before)}",
        "adapter/up": "adapter_up",
        "adapter/layer_norm_before": "adapter_norm_before",
        "adapter/layer_norm_after": "adapter_norm_after",
    }
    names = {"left": "W_left", "right": "W_right", "blocks": "W", "kernel": "weight"}
    by_path, shared = {}, {}
    for path, value in params.items():
        parent, _, leaf = path.rpartition("/")
        values = torch.tensor(np.float64(value.T if leaf == "kernel" else value))
        if not parent:
            name = leaf.replace("phm_down", "W_down").replace("phm_up", "W_up")
            by_path[path] = shared[name.removesuffix("_blocks")] = values.requires_grad_()
            continue
        if "layer_norm" in parent:
            name = {"scale": "weight"}.get(leaf, leaf)
        else:
            name = {**names, "bias": "b" if phm else "bias"}.get(leaf, leaf)
        by_path[path] = module.get_parameter(f"{layers[parent]}.{name}")
        by_path[path].data.copy_(values)
    return module, by_path, shared


HUB_KNOBS = (
    "dense, layer norms",
    "compacter",
    "rank three",
    "scaled",
    "layer norm before",
    "own rules, factorized",
    "shared rule, factorized",
    "shared full blocks",
    "PHM-Adapter",
)


@pytest.mark.parametrize("knob", HUB_KNOBS)
def test_output_and_gradients_equal_adapterhub(knob):
    """A scaled norm on the output is left out: AdapterHub scales the input of that norm."""
    config = method_of(knob)
    torch = pytest.importorskip("torch")
    params = random_params(Model(config), seed=3)
    module, parameters, shared = adapterhub_adapter(config, params)
    x, cotangent = random_states(4), random_states(5)

    from adapters.context import ForwardContext

    context = ForwardContext.__new__(ForwardContext)
    context.shared_parameters = {"a": shared}
    ForwardContext.get_contexts().append(context)
    inputs = torch.tensor(np.float64(x), requires_grad=True)
    try:
        theirs, _, _ = module(inputs, inputs)
    finally:
        ForwardContext.get_contexts().pop()
    (theirs * torch.tensor(cotangent)).sum().backward()
    gradients = {path: parameter.grad.numpy() for path, parameter in parameters.items()}
    gradients = {
        path: gradient.T if path.endswith("kernel") else gradient
        for path, gradient in gradients.items()
    }
    assert_equal_to_rounding(
        output_and_gradients(Model(config), params, x, cotangent),
        (theirs.detach().numpy(), {**gradients, "x": inputs.grad.numpy()}),
    )
