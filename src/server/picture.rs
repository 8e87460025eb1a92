//! Pictures as requests carry them.

use std::sync::Arc;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::Bytes;
use serde::Deserialize;
use utoipa::ToSchema;

use super::App;
use super::error::ApiError;
use crate::engine::Sight;

/// With or without the padding, for clients differ.
const BASE64: GeneralPurpose =
    GeneralPurpose::new(&STANDARD, GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent));

/// A picture: exactly one of the three.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PictureIn {
    /// The encoded picture (JPEG, PNG, GIF, WebP, BMP, TIFF, PNM) in base64.
    pub data: Option<String>,
    /// The same as a data URL; an https address only where the server allows its host.
    #[schema(example = "data:image/png;base64,iVBORw0KGgo=")]
    pub url: Option<String>,
    /// What `/images` gave for a picture that was looked at before.
    pub image_id: Option<String>,
}

/// Files of a form, in order.
#[derive(Default)]
pub struct Uploads(Vec<Bytes>);

/// A picture that is here.
#[derive(Clone, Debug)]
pub enum Given {
    /// Encoded.
    Bytes(Arc<[u8]>),
    /// Looked at before, in another request.
    Id(String),
    /// Looked at in this one.
    Seen(Box<Sight>),
}

impl Uploads {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds a file; an error unless it is called `image`.
    pub fn push(&mut self, name: String, bytes: Bytes) -> Result<(), ApiError> {
        if !["image", "images"].contains(&name.as_str()) {
            return Err(ApiError::unsupported(&name, "files of a form are called `image`"));
        }
        self.0.push(bytes);
        Ok(())
    }
}

/// The pictures of a request, the files of its form first; each or why it cannot be had.
pub async fn given(app: &Arc<App>, named: Vec<PictureIn>, uploads: Uploads) -> Result<Vec<Result<Given, ApiError>>, ApiError> {
    let n = named.len() + uploads.0.len();
    let most = app.config.limits.max_pictures;
    if n == 0 {
        return Err(ApiError::invalid("there is no picture").about("images"));
    }
    if n > most {
        return Err(ApiError::invalid(format!("{n} pictures are more than the {most} that a request may have")).about("images"));
    }
    let mut found: Vec<_> = uploads.0.into_iter().map(|bytes| Ok(Given::Bytes(Arc::from(&*bytes)))).collect();
    for (place, picture) in named.into_iter().enumerate() {
        found.push(one(app, picture).await.map_err(|error| error.about(format!("images[{place}]"))));
    }
    Ok(found)
}

/// One picture of a request.
pub async fn one(app: &Arc<App>, picture: PictureIn) -> Result<Given, ApiError> {
    match picture {
        PictureIn { data: Some(data), url: None, image_id: None } => decoded(data).await,
        PictureIn { data: None, url: Some(url), image_id: None } => behind(app, url).await,
        PictureIn { data: None, url: None, image_id: Some(id) } => Ok(Given::Id(id)),
        _ => Err(ApiError::invalid("a picture has exactly one of data, url and image_id")),
    }
}

/// The picture that an address holds or names.
pub async fn behind(app: &Arc<App>, url: String) -> Result<Given, ApiError> {
    let scheme = url.split_once(':').map(|(scheme, _)| scheme.to_ascii_lowercase());
    match scheme.as_deref() {
        Some("data") => match data_of(&url) {
            Some(start) => decoded(url[start..].to_owned()).await,
            None => Err(ApiError::picture("a data URL is data:image/…;base64,…")),
        },
        _ => fetched(app, url).await,
    }
}

/// Where the base64 of a data URL begins.
fn data_of(url: &str) -> Option<usize> {
    let comma = url.find(',')?;
    url[..comma].to_ascii_lowercase().ends_with(";base64").then_some(comma + 1)
}

async fn fetched(app: &Arc<App>, url: String) -> Result<Given, ApiError> {
    if !app.remote.is_on() {
        return Err(ApiError::picture("pictures behind addresses are not fetched here; send a data URL"));
    }
    let _turn = app.fetches.acquire().await.map_err(|_| ApiError::internal())?;
    let (app, most) = (app.clone(), app.config.limits.max_body_bytes as u64);
    let fetch = tokio::task::spawn_blocking(move || app.remote.fetch(&url, most));
    let bytes = fetch.await.map_err(|_| ApiError::internal())?.map_err(|error| ApiError::picture(error.to_string()))?;
    Ok(Given::Bytes(bytes.into()))
}

async fn decoded(text: String) -> Result<Given, ApiError> {
    let decode = move || match BASE64.decode(text) {
        Ok(bytes) => Ok(Given::Bytes(bytes.into())),
        Err(_) => Err(ApiError::picture("the picture is not base64")),
    };
    tokio::task::spawn_blocking(decode).await.map_err(|_| ApiError::internal())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_base64_is_taken_from_a_data_url() {
        for (url, found) in [
            ("data:image/png;base64,AAAA", Some("AAAA")),
            ("DATA:image/png;charset=x;BASE64,AA,AA", Some("AA,AA")),
            ("data:;base64,", Some("")),
            ("data:image/png,AAAA", None),
            ("data:image/png;base64", None),
        ] {
            assert_eq!(data_of(url).map(|start| &url[start..]), found, "{url}");
        }
    }
}
