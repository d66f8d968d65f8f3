"""The stages in data order: reference, schedule, denoise, refine, decode. Each defines the type it produces."""
