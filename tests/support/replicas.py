"""Virtual CPUs for `tf.distribute`, of which a process has one unless it asks before it begins."""

from __future__ import annotations

import tensorflow as tf

CPUS = 4

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * CPUS
)


def mirrored(replicas: int) -> tf.distribute.MirroredStrategy:
    # The collectives of two strategies of one process would get in each other's way.
    ops = tf.distribute.ReductionToOneDevice()
    devices = [f"CPU:{i}" for i in range(replicas)]
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=ops)
    assert strategy.num_replicas_in_sync == replicas
    return strategy
