//! Pictures beside texts: matching, similarity, vectors.

use super::see::{Reader, Seer, Sight};
use crate::bundle::TaskName;
use crate::error::Error;
use crate::stage1::{PairEmbedding, Stage1, TextEmbedding};
use crate::text::TokenBatch;

/// Pairs that run in one batch; more make no picture faster and cost memory.
const BATCH: usize = 32;

/// How a text fits a picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Match {
    /// Image–text matching: the probability that the text is about the picture.
    pub itm_probability: f32,
    /// The logit of the class "fits"; retrieval orders pictures by this and the similarity together.
    pub itm_logit: f32,
    /// Image–text contrastive similarity: a cosine, the largest over the queries.
    pub itc_similarity: f32,
}

/// A text that was read once and can be compared with many pictures.
#[derive(Clone, Debug)]
pub struct ReadText {
    text: String,
    embedding: TextEmbedding,
}

impl Seer {
    /// How well each text fits its picture. Pairs are read in batches; texts of different lengths give what they give alone.
    pub fn match_texts(&mut self, pairs: &[(&Sight, &str)]) -> Result<Vec<Match>, Error> {
        self.context.bundle.require(TaskName::Match)?;
        let texts = self.read_texts(&pairs.iter().map(|(_, text)| *text).collect::<Vec<_>>())?;
        self.match_read(&pairs.iter().zip(&texts).map(|((sight, _), text)| (*sight, text)).collect::<Vec<_>>())
    }

    /// Texts that are to be compared with several pictures.
    pub fn read_texts(&mut self, texts: &[&str]) -> Result<Vec<ReadText>, Error> {
        let embeddings = self.embed_texts(texts)?.into_iter();
        Ok(texts.iter().zip(embeddings).map(|(text, embedding)| ReadText { text: (*text).to_owned(), embedding }).collect())
    }

    /// As [`match_texts`](Self::match_texts), of texts that were read before.
    pub fn match_read(&mut self, pairs: &[(&Sight, &ReadText)]) -> Result<Vec<Match>, Error> {
        let read = self.embed_pairs(&pairs.iter().map(|(sight, text)| (*sight, text.text.as_str())).collect::<Vec<_>>())?;
        let of = |((sight, text), pair): (&(&Sight, &ReadText), &PairEmbedding)| Match {
            itm_probability: pair.probability(),
            itm_logit: pair.itm_logits[1],
            itc_similarity: sight.embedding().map_or(f32::NAN, |image| image.similarity(&text.embedding)),
        };
        Ok(pairs.iter().zip(&read).map(of).collect())
    }

    /// Texts in the space of pictures and texts.
    pub fn embed_texts(&mut self, texts: &[&str]) -> Result<Vec<TextEmbedding>, Error> {
        self.context.bundle.require(TaskName::Embed)?;
        let mut found = Vec::with_capacity(texts.len());
        for texts in texts.chunks(BATCH) {
            let batch = self.qformer_tokens(texts)?;
            found.extend(self.stage1().read(&batch)?);
        }
        Ok(found)
    }

    /// Pictures read together with a text each.
    pub fn embed_pairs(&mut self, pairs: &[(&Sight, &str)]) -> Result<Vec<PairEmbedding>, Error> {
        self.context.bundle.require(TaskName::Match)?;
        pairs.iter().try_for_each(|(sight, _)| self.know(sight))?;
        let mut found = Vec::with_capacity(pairs.len());
        for pairs in pairs.chunks(BATCH) {
            let batch = self.qformer_tokens(&pairs.iter().map(|(_, text)| *text).collect::<Vec<_>>())?;
            let features: Vec<_> = pairs.iter().filter_map(|(sight, _)| sight.features()).collect();
            found.extend(self.stage1().compare(&features, &batch)?);
        }
        Ok(found)
    }

    fn qformer_tokens(&self, texts: &[&str]) -> Result<TokenBatch, Error> {
        let pad = self.context.bundle.facts().qformer.text.as_ref().map_or(0, |facts| facts.pad);
        let ids = texts.iter().map(|text| Ok(self.context.reading(text)?.ids)).collect::<Result<Vec<_>, Error>>()?;
        Ok(TokenBatch::new(&ids, pad))
    }

    fn stage1(&mut self) -> &mut Stage1 {
        match &mut self.reader {
            Reader::Stage1(stage1) => stage1,
            Reader::Queries(_) => unreachable!("only a stage-1 bundle has the tasks that come here"),
        }
    }
}
