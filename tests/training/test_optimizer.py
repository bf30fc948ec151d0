from clip_train.models import create_dual_encoder
from clip_train.training.optimizer import build_adamw
from tests.models.test_dual_encoder import TINY


def test_decay_on_matrices_only():
    model = create_dual_encoder(**TINY)
    optimizer = build_adamw(model, lr=1e-3, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, fused=True)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in model.named_parameters()}
    assert len(by_name) == len(list(model.parameters()))
    assert by_name["logit_scale"] == by_name["vision.trunk.cls_token"] == 0
    assert by_name["vision.trunk.pos_embed"] == by_name["text.trunk.embeddings.token_embedding.weight"] == 0.2
    for name, value in by_name.items():
        if name.endswith("bias") or "norm" in name:
            assert value == 0, name
        elif name.endswith("weight"):
            assert value == 0.2, name


def test_frozen_parameters_are_left_out():
    model = create_dual_encoder(**TINY)
    model.vision.requires_grad_(False)
    optimizer = build_adamw(model, lr=1e-3, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6, fused=False)
    chosen = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert chosen == {id(p) for p in [*model.text.parameters(), model.logit_scale]}
