"""From sources of captioned images and text to batches: sources -> documents -> packed rows -> loader."""

from transfusion.data.autoencoder import Autoencoder, DiffusersAutoencoder, PixelAutoencoder
from transfusion.data.config import DataConfig, image_source, make_autoencoder, make_loader, text_source
from transfusion.data.documents import caption_image_document, evaluation_batch, mismatched, text_documents
from transfusion.data.drafting import Mixture, caption_ids
from transfusion.data.emoji import DEMO_EMOJI, EmojiSource
from transfusion.data.hub import HubImages, HubImageStream, HubTexts, HubTextStream
from transfusion.data.latent_cache import LatentCache
from transfusion.data.loader import Loader, LoaderConfig
from transfusion.data.packing import RowPlan, pack
from transfusion.data.sources import (
    CaptionedImage,
    FileSlice,
    FolderSource,
    ImageSource,
    SampleError,
    TextSource,
)
from transfusion.data.streams import JsonlTexts, Stream, TarImages
from transfusion.data.texts import PydocTextSource, TextFolderSource
from transfusion.data.tokenizer import Tokenizer
from transfusion.data.transforms import to_image, to_tensor

__all__ = [
    "DEMO_EMOJI",
    "Autoencoder",
    "CaptionedImage",
    "DataConfig",
    "DiffusersAutoencoder",
    "EmojiSource",
    "FileSlice",
    "FolderSource",
    "HubImageStream",
    "HubImages",
    "HubTextStream",
    "HubTexts",
    "ImageSource",
    "JsonlTexts",
    "LatentCache",
    "Loader",
    "LoaderConfig",
    "Mixture",
    "PixelAutoencoder",
    "PydocTextSource",
    "RowPlan",
    "SampleError",
    "Stream",
    "TarImages",
    "TextFolderSource",
    "TextSource",
    "Tokenizer",
    "caption_ids",
    "caption_image_document",
    "evaluation_batch",
    "image_source",
    "make_autoencoder",
    "make_loader",
    "mismatched",
    "pack",
    "text_documents",
    "text_source",
    "to_image",
    "to_tensor",
]
