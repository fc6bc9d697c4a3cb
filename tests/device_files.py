"""A device of one's own, as a file gives it."""

DEVICE_YAML = """
description: a card of mine
peak_flops: 312e12
memory_bandwidth: 1.5e+12
memory_bytes: 48e9
matmul_efficiency: 0.7
attention_efficiency: 0.5
bandwidth_efficiency: 0.8
network: pcie
source: its data sheet
"""
