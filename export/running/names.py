"""What the graphs are called: as transformers.js has them. No torch: runtimes read the names, too."""

VISION, EMBED, ENCODER, DECODER = "vision_encoder", "embed_tokens", "encoder_model", "decoder_model_merged"
TOWERS = VISION_TOWER, TEXT_TOWER = "vision_model", "text_model"  # of a dual encoder
