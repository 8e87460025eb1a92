//! Every route, and what stands before it.

mod admin;
mod ask;
mod caption;
mod chat;
mod cohere;
mod embed;
mod embeddings;
mod health;
mod images;
mod matching;
mod messages;
mod models;
pub(super) mod options;
mod page;
mod rank;
mod responses;
mod results;
mod score;
mod stream;
mod tokenize;
mod turn;

use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::decompression::RequestDecompressionLayer;
use utoipa::OpenApi;

use super::App;
use super::guard;
use super::kserve::{grpc, http as kserve};

/// What the server offers.
#[derive(OpenApi)]
#[openapi(
    info(title = "blip2 serve", description = "BLIP-2: captions, questions, matching, vectors."),
    paths(
        caption::caption, ask::ask, matching::match_texts, embed::embed, rank::rank, images::look, images::forget, page::samples,
        page::sample, chat::complete, responses::respond, responses::stored, models::list, models::one, embeddings::embed,
        score::score, score::rerank, cohere::embed, cohere::embed_v1, tokenize::tokenize, tokenize::detokenize, health::live, health::ready,
        health::version, health::load, health::metrics, admin::load, admin::unload, kserve::server, kserve::live, kserve::ready,
        kserve::model, kserve::model_ready, kserve::infer
    ),
    modifiers(&Bearer),
    security((), ("bearer" = [])),
)]
struct Api;

/// Keys are sent as bearer tokens.
struct Bearer;

impl utoipa::Modify for Bearer {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
        let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
        api.components.get_or_insert_default().add_security_scheme("bearer", bearer);
    }
}

/// What the server offers, as an OpenAPI document in JSON.
pub fn openapi() -> String {
    Api::openapi().to_pretty_json().expect("it is made of strings and numbers")
}

/// Everything; what an address of its own has is not here.
pub fn all(app: &Arc<App>) -> Router {
    let asks = Router::new()
        .route("/caption", post(caption::caption))
        .route("/ask", post(ask::ask))
        .route("/match", post(matching::match_texts))
        .route("/embed", post(embed::embed))
        .route("/rank", post(rank::rank))
        .route("/images", post(images::look))
        .route("/v1/chat/completions", post(chat::complete))
        .route("/v1/responses", post(responses::respond))
        .route("/v1/embeddings", post(embeddings::embed))
        .route("/v1/score", post(score::score))
        .route("/score", post(score::score))
        .route("/v1/rerank", post(score::rerank))
        .route("/v2/embed", post(cohere::embed))
        .route("/v1/embed", post(cohere::embed_v1))
        .route("/v2/rerank", post(score::rerank))
        .route("/rerank", post(score::rerank))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .layer(RequestDecompressionLayer::new())
        .layer(from_fn_with_state(app.clone(), guard::make_room));
    let known = Router::new()
        .route("/images/{image_id}", delete(images::forget))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{model}", get(models::one))
        .route("/v1/responses/{response_id}", get(responses::stored))
        .route("/samples", get(page::samples))
        .route("/samples/{name}", get(page::sample))
        .route("/version", get(health::version))
        .route("/load", get(health::load))
        .route("/openapi.json", get(async || Json(Api::openapi())));
    let known = if app.config.admin_listen.is_none() { known.merge(controls()) } else { known };
    let open = Router::new()
        .route("/", get(page::index))
        .route("/page/app.js", get(page::script))
        .route("/page/style.css", get(page::style));
    guarded(app, asks.merge(known)).merge(observed(app, open.merge(healths()).merge(kserve::routes(app)))).with_state(app.clone())
}

/// What is for those who run the server, on an address of its own.
pub fn admin(app: &Arc<App>) -> Router {
    guarded(app, controls()).merge(observed(app, healths())).with_state(app.clone())
}

/// What gRPC has, on an address of its own.
pub fn of_grpc(app: &Arc<App>) -> Router {
    observed(app, grpc::routes(app)).with_state(app.clone())
}

fn healths() -> Router<Arc<App>> {
    Router::new().route("/health/live", get(health::live)).route("/health/ready", get(health::ready))
}

fn controls() -> Router<Arc<App>> {
    Router::new()
        .route("/metrics", get(health::metrics))
        .route("/admin/models/{model}/load", post(admin::load))
        .route("/admin/models/{model}/unload", post(admin::unload))
}

/// For callers that are known alone; whatever has no route is behind the same door.
fn guarded(app: &Arc<App>, router: Router<Arc<App>>) -> Router<Arc<App>> {
    let router = router
        .fallback(guard::nowhere)
        .method_not_allowed_fallback(guard::otherwise)
        .layer(from_fn_with_state(app.clone(), guard::admit));
    observed(app, router)
}

fn observed(app: &Arc<App>, router: Router<Arc<App>>) -> Router<Arc<App>> {
    let stack = ServiceBuilder::new()
        .layer(from_fn_with_state(app.clone(), guard::observe))
        .layer(CatchPanicLayer::custom(guard::panicked))
        // `body` has the limit.
        .layer(DefaultBodyLimit::disable());
    router.layer(stack)
}
