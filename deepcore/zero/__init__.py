"""Floor 3: the ZeRO stages (Rajbhandari et al. 2020), one small file each, and the hooks that drive them."""
