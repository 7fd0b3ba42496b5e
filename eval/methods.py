"""The methods by the names that the training script gives them: titles, and the paper's learning rates for subjects."""

TITLES = {
    "delora": "DeLoRA",
    "lora": "LoRA",
    "dora": "DoRA",
    "dora_fixed_magnitude": "DoRA with fixed magnitude",
    "ether": "ETHER",
    "etherplus": "ETHER+",
    "etherplus_onesided": "one-sided ETHER+",
    "oft": "OFT",
    "delora_symmetric": "symmetric multiplicative DeLoRA",
    "delora_multiplicative": "multiplicative DeLoRA",
    "full": "full fine-tuning",
}
LEARNING_RATES = {
    "delora": 2e-2,
    "lora": 6e-4,
    "dora": 6e-4,
    "dora_fixed_magnitude": 6e-4,
    "ether": 6e-3,
    "etherplus": 6e-3,
    "etherplus_onesided": 6e-3,
    "oft": 6e-5,
    "delora_symmetric": 2e-2,
    "delora_multiplicative": 2e-2,
    "full": 5e-6,
}
LAMBDA_LEARNING_RATE = 1e-3
