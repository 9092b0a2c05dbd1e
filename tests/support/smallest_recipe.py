"""The text of a recipe with no more than it must have."""

RECIPE = """
student: {model: cifar_resnet8}
losses: {ce: {}}
data: {path: shards, size: 16, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
epochs: 3
batch: 4
schedule: {rate: 0.1}
"""
