"""DINOv2's ViT-L/14 (Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision"), to see with.

Its authors' network with timm's layers, of the same names, so that nothing of a model hub has to be run. Stein et al.
2023, "Exposing flaws of generative model evaluation metrics", found Fréchet distances on it nearest to what people see.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.torchvision_repair import repair

SIDE, PATCH = 224, 14  # pixels
OFFSET = 0.1  # of the scale at which the authors resample positions
SHAPE: dict[str, int] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours in [0, 1]


class DinoV2(nn.Module):
    """The class token after the last norm: (B, 3, H, W) uint8 → (B, 1024) float32. 155 GFLOP an image.

    Images are brought to 224×224 pixels as torch-fidelity does it: bilinearly, without antialiasing, as TensorFlow 1
    did. ``state``: the authors' weights, by their names; RuntimeError where they do not fit.
    """

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        repair()
        import timm

        with torch.device("meta"):  # neither storage nor random numbers before the weights are there
            self.network = timm.create_model("vit_large_patch14_dinov2", img_size=SIDE, num_classes=0, **SHAPE)
        state = {name: tensor for name, tensor in state.items() if name != "mask_token"}  # of its training alone
        state["pos_embed"] = positions(state["pos_embed"], SIDE // PATCH)
        self.network.load_state_dict(state, assign=True)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Features of ``images``."""
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(SIDE, SIDE), align_corners=False)
        mean, std = (255 * x.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        return self.network((x - mean) / std)


def positions(embedding: Tensor, side: int) -> Tensor:
    """Position embeddings (1, 1 + n², D), the class token's first, for a grid of side² patches: (1, 1 + side², D).

    Bicubic, and at the scale (side + 0.1) / n, as in the authors' code, whose features depend on that tenth."""
    first, grid = embedding[:, :1], embedding[:, 1:]
    n = round(grid.shape[1] ** 0.5)
    grid = grid.unflatten(1, (n, n)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(side + OFFSET) / n, mode="bicubic")
    return torch.cat([first, grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
