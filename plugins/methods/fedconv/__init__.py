"""FedConv (Shen et al., MobiSys 2024): learned compression and dilation of submodels."""
