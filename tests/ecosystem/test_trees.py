"""Every optimizer on the parameters of every library: equal to plain ones.

A form says how a library holds parameters, and how it steps. What it does to
the numbers is compared with a run on dictionaries of arrays.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.struct
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from gnlorp_jax.training import sharding
