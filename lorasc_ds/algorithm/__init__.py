"""The paper, in torch alone: nothing here knows of ranks, engines, files of models or configurations."""
