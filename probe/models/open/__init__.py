"""Every way in for a model that is not ours, one file each: transformers' models, TransformerBridges, any module."""
