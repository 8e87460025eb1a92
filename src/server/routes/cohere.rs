//! `POST /v2/embed` and `/v1/embed`: Cohere's form of vectors.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::{Extension, Json};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::embed::{of_texts, vector, vectors};
use super::embeddings::{base64, n_read};
use super::messages::{Part, Thing};
use super::options::{check_plain, is_plain};
use crate::bundle::TaskName;
use crate::pixels::Header;
use crate::server::App;
use crate::server::body;
use crate::server::call::{self, Call};
use crate::server::error::{ApiError, ErrorBody};
use crate::server::keys::Caller;
use crate::server::picture::{self, Given, PictureIn, Uploads};
use crate::service::Want;

/// Texts or pictures to turn into vectors: exactly one of `texts`, `images` and `inputs`.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "what is not read is named to be allowed")]
pub struct CohereEmbedRequest {
    /// The model; the first that embeds if absent.
    model: Option<String>,
    /// Is not read: documents, queries and pictures are of one space.
    input_type: Option<InputType>,
    /// The texts.
    texts: Option<Vec<String>>,
    /// Pictures (JPEG, PNG, GIF, WebP) as data URLs.
    images: Option<Vec<String>>,
    /// Texts and pictures, each as the one part of an input.
    inputs: Option<Vec<EmbedInput>>,
    /// Which forms the vectors have; float if absent.
    embedding_types: Option<Vec<EmbeddingType>>,
    /// A text that is too long is refused, whatever this says.
    truncate: Option<Truncate>,
    /// Only null: texts are not cut.
    max_tokens: Option<Value>,
    /// Only null: vectors have the length that the model gives them.
    output_dimension: Option<Value>,
    /// Is not read.
    #[schema(value_type = Value)]
    priority: Option<IgnoredAny>,
}

/// What vectors are for.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "they are Cohere's words")]
pub enum InputType {
    SearchDocument,
    SearchQuery,
    Classification,
    Clustering,
    Image,
}

/// What is cut of a text that is too long.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "they are Cohere's words")]
pub enum Truncate {
    None,
    Start,
    End,
}

/// A form of vectors.
#[derive(Clone, Copy, Deserialize, ToSchema, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum EmbeddingType {
    /// Numbers.
    Float,
    /// Little-endian float32 in base64.
    Base64,
}

/// A text or a picture.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EmbedInput {
    /// One part.
    content: Vec<Part>,
}

/// Vectors of length 1, of one space, in the order of what was asked.
#[derive(Serialize, ToSchema)]
pub struct CohereEmbedResponse {
    id: String,
    /// `embeddings_by_type`.
    response_type: &'static str,
    embeddings: ByType,
    /// The texts that were given.
    texts: Vec<String>,
    /// The pictures that were given.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    images: Vec<ImageInfo>,
    meta: Meta,
}

/// Vectors as Cohere's first form has them: in forms if `embedding_types` named some, otherwise plain.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
pub enum CohereEmbedV1Response {
    /// As `/v2/embed` has them.
    ByType(CohereEmbedResponse),
    /// Numbers alone.
    Floats(CohereFloats),
}

/// Vectors of length 1, of one space, in the order of what was asked.
#[derive(Serialize, ToSchema)]
pub struct CohereFloats {
    id: String,
    /// `embeddings_floats`.
    response_type: &'static str,
    embeddings: Vec<Vec<f32>>,
    /// The texts that were given.
    texts: Vec<String>,
    /// The pictures that were given.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    images: Vec<ImageInfo>,
    meta: Meta,
}

/// Vectors in the forms that were wanted.
#[derive(Serialize, ToSchema)]
pub struct ByType {
    #[serde(skip_serializing_if = "Option::is_none")]
    float: Option<Vec<Vec<f32>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base64: Option<Vec<String>>,
}

/// A picture as its file stores it.
#[derive(Serialize, ToSchema)]
pub struct ImageInfo {
    width: u32,
    height: u32,
    format: &'static str,
    bit_depth: u16,
}

/// What is told beside an answer.
#[derive(Serialize, ToSchema)]
pub struct Meta {
    api_version: ApiVersion,
    /// From `/v1/embed`, whose clients add them up: the same as `tokens`.
    #[serde(skip_serializing_if = "Option::is_none")]
    billed_units: Option<Tokens>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens: Option<Tokens>,
}

/// Which protocol this is.
#[derive(Serialize, ToSchema)]
#[schema(as = CohereApiVersion)]
pub struct ApiVersion {
    /// `2`, or `1` from `/v1/embed`.
    version: &'static str,
}

/// How many tokens there were.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[schema(as = CohereTokens)]
pub struct Tokens {
    /// That were read, query tokens of pictures included.
    input_tokens: usize,
    output_tokens: usize,
}

/// Turns texts or pictures into vectors of one space.
#[utoipa::path(
    post, path = "/v2/embed", tag = "retrieval",
    request_body = CohereEmbedRequest,
    responses((status = 200, body = CohereEmbedResponse), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn embed(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<CohereEmbedResponse>, ApiError> {
    let (asked, found) = Found::of_request(&app, caller, request).await?;
    let meta = Meta::new(Some(found.tokens));
    Ok(Json(found.by_type(meta, asked.embedding_types.as_deref())))
}

/// Turns texts or pictures into vectors of one space: the form before `/v2/embed`, which older clients speak.
#[utoipa::path(
    post, path = "/v1/embed", tag = "retrieval",
    request_body = CohereEmbedRequest,
    responses((status = 200, body = CohereEmbedV1Response), (status = "4XX", body = ErrorBody), (status = "5XX", body = ErrorBody)),
)]
pub async fn embed_v1(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<CohereEmbedV1Response>, ApiError> {
    let (asked, found) = Found::of_request(&app, caller, request).await?;
    let (forms, meta) = (asked.embedding_types.as_deref(), Meta::v1(found.tokens));
    Ok(Json(match forms {
        Some(_) => CohereEmbedV1Response::ByType(found.by_type(meta, forms)),
        None => CohereEmbedV1Response::Floats(found.floats(meta)),
    }))
}

impl Meta {
    /// Of an answer for which so many tokens were read, where they are counted.
    pub fn new(tokens: Option<Tokens>) -> Self {
        Self { api_version: ApiVersion { version: "2" }, billed_units: None, tokens }
    }

    /// Of the form before.
    fn v1(tokens: Tokens) -> Self {
        Self { api_version: ApiVersion { version: "1" }, billed_units: Some(tokens), tokens: Some(tokens) }
    }
}

impl CohereEmbedRequest {
    /// What is to be embedded; an error for what BLIP-2 has no place for.
    fn things(&mut self) -> Result<Vec<Thing>, ApiError> {
        check_plain(&[
            ("max_tokens", is_plain(&self.max_tokens, &[])),
            ("output_dimension", is_plain(&self.output_dimension, &[])),
            ("embedding_types", self.embedding_types.as_ref().is_none_or(|forms| !forms.is_empty())),
        ])?;
        match (self.texts.take(), self.images.take(), self.inputs.take()) {
            (Some(texts), None, None) => Ok(texts.into_iter().map(Thing::Text).collect()),
            (None, Some(images), None) => Ok(images.into_iter().map(at).collect()),
            (None, None, Some(inputs)) => inputs.into_iter().map(EmbedInput::thing).collect(),
            _ => Err(ApiError::invalid("exactly one of texts, images and inputs is needed").about("texts")),
        }
    }
}

impl EmbedInput {
    fn thing(self) -> Result<Thing, ApiError> {
        let [part] = <[Part; 1]>::try_from(self.content)
            .map_err(|_| ApiError::invalid("an input has one part: a text or a picture").about("inputs"))?;
        Ok(part.thing())
    }
}

fn id() -> String {
    format!("embed-{:032x}", rand::random::<u128>())
}

fn at(url: String) -> Thing {
    Thing::Picture(PictureIn { url: Some(url), ..PictureIn::default() })
}

/// Vectors in the order of what was asked, with the texts and the pictures among them, and how many tokens were read.
struct Found {
    vectors: Vec<Vec<f32>>,
    texts: Vec<String>,
    images: Vec<ImageInfo>,
    tokens: Tokens,
}

impl Found {
    async fn of_request(app: &Arc<App>, caller: Caller, request: Request) -> Result<(CohereEmbedRequest, Self), ApiError> {
        let said = body::read::<CohereEmbedRequest>(app, request).await?;
        let mut asked = said.value;
        let things = asked.things()?;
        let call = Call::new(app, caller, (asked.model.as_deref(), TaskName::Embed, &[]), said.room)?;
        let found = Self::of(&call, things).await?;
        Ok((asked, found))
    }

    fn by_type(self, meta: Meta, forms: Option<&[EmbeddingType]>) -> CohereEmbedResponse {
        let Self { vectors, texts, images, .. } = self;
        let wants = |form| forms.map_or(form == EmbeddingType::Float, |forms| forms.contains(&form));
        let base64 = wants(EmbeddingType::Base64).then(|| vectors.iter().map(|vector| base64(vector)).collect());
        let embeddings = ByType { base64, float: wants(EmbeddingType::Float).then_some(vectors) };
        CohereEmbedResponse { id: id(), response_type: "embeddings_by_type", embeddings, texts, images, meta }
    }

    fn floats(self, meta: Meta) -> CohereFloats {
        let Self { vectors: embeddings, texts, images, .. } = self;
        CohereFloats { id: id(), response_type: "embeddings_floats", embeddings, texts, images, meta }
    }

    /// All texts are read together; every picture is looked at.
    async fn of(call: &Call, things: Vec<Thing>) -> Result<Self, ApiError> {
        let (mut texts, mut named, mut are_texts) = (Vec::new(), Vec::new(), Vec::new());
        for thing in things {
            are_texts.push(matches!(thing, Thing::Text(_)));
            match thing {
                Thing::Text(text) => texts.push(text),
                Thing::Picture(picture) => named.push(picture),
            }
        }
        if named.is_empty() || !texts.is_empty() {
            call::check_list(&call.app, &texts, "texts")?;
        }
        let (mut asked, mut images) = (Vec::new(), Vec::new());
        let has_pictures = !named.is_empty();
        for given in if has_pictures { picture::given(&call.app, named, Uploads::default()).await? } else { Vec::new() } {
            let given = given?;
            images.push(ImageInfo::of(&given)?);
            asked.push(call.asked(Ok(given), Want::Embed));
        }
        if !texts.is_empty() {
            asked.push(Ok(of_texts(call, texts.clone())));
        }
        let mut ends = call.finish(asked).await?;
        let mut of_texts = ends.drain(images.len()..).next().map_or(Ok(Vec::new()), |end| vectors(end?))?.into_iter();
        let mut of_pictures = ends.into_iter();
        let mut next = |is_text| if is_text { of_texts.next().map(Ok) } else { of_pictures.next().map(|end| Ok(vector(end?)?.0)) };
        let vectors = are_texts.into_iter().filter_map(&mut next).collect::<Result<_, ApiError>>()?;
        let tokens = Tokens { input_tokens: n_read(call, &texts, images.len()), output_tokens: 0 };
        Ok(Self { vectors, texts, images, tokens })
    }
}

impl ImageInfo {
    fn of(given: &Given) -> Result<Self, ApiError> {
        let Given::Bytes(bytes) = given else { return Err(ApiError::invalid("an image_id has no place here").about("inputs")) };
        let header = Header::read(bytes).ok_or_else(|| ApiError::picture("the picture is no whole JPEG, PNG, GIF or WebP"))?;
        let Header { format, width, height, bit_depth } = header;
        Ok(Self { width, height, format, bit_depth })
    }
}
