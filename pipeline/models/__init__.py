from pipeline.models.create import create_model, known_models

__all__ = ["create_model", "known_models"]
