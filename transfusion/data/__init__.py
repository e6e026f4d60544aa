"""From sources of captioned images and text to batches: sources -> documents -> packed rows -> loader."""

from transfusion.data.autoencoder import Autoencoder, DiffusersAutoencoder, PixelAutoencoder
from transfusion.data.documents import caption_image_document, evaluation_batch, mismatched, text_documents
from transfusion.data.emoji import DEMO_EMOJI, EmojiSource
from transfusion.data.loader import Loader, LoaderConfig, LoaderStats, caption_ids
from transfusion.data.packing import RowPlan, pack
from transfusion.data.sources import (
    CaptionedImage,
    FolderSource,
    ImageSource,
    PydocTextSource,
    SampleError,
    TextFolderSource,
    TextSource,
)
from transfusion.data.tokenizer import Tokenizer
from transfusion.data.transforms import to_image, to_tensor

__all__ = [
    "DEMO_EMOJI",
    "Autoencoder",
    "CaptionedImage",
    "DiffusersAutoencoder",
    "EmojiSource",
    "FolderSource",
    "ImageSource",
    "Loader",
    "LoaderConfig",
    "LoaderStats",
    "PixelAutoencoder",
    "PydocTextSource",
    "RowPlan",
    "SampleError",
    "TextFolderSource",
    "TextSource",
    "Tokenizer",
    "caption_ids",
    "caption_image_document",
    "evaluation_batch",
    "mismatched",
    "pack",
    "text_documents",
    "to_image",
    "to_tensor",
]
