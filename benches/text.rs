//! Prompts to tokens and tokens to text, beside the `tokenizers` crate alone.

#![allow(missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;

use blip2::bundle::Bundle;
use blip2::text::{Text, TextStream};
use criterion::{Criterion, criterion_group, criterion_main};
use tokenizers::Tokenizer;

const QUESTION: &str = "Question: what colour is the large square to the left of the two circles? Answer:";

fn text(c: &mut Criterion) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-opt");
    let bundle = Bundle::open(&folder).expect("a demo");
    let ours = Arc::new(Text::open(&bundle, bundle.tokenizer()).expect("a tokenizer"));
    let plain = Tokenizer::from_file(folder.join(bundle.tokenizer())).expect("a tokenizer");
    c.bench_function("encode", |b| b.iter(|| ours.encode(black_box(QUESTION))));
    c.bench_function("encode, tokenizers crate", |b| b.iter(|| plain.encode(black_box(QUESTION), true)));
    let ids = ours.encode_plain(QUESTION).expect("a plain text").ids;
    c.bench_function("decode", |b| b.iter(|| ours.decode(black_box(&ids))));
    c.bench_function("decode, tokenizers crate", |b| b.iter(|| plain.decode(black_box(&ids), true)));
    let stream = |ids: &[u32]| {
        let mut stream = TextStream::new(ours.clone());
        ids.iter().map(|id| stream.push(*id)).collect::<String>()
    };
    c.bench_function("stream", |b| b.iter(|| stream(black_box(&ids))));
    let plain_stream = |ids: &[u32]| {
        let mut stream = plain.decode_stream(true);
        ids.iter().filter_map(|id| stream.step(*id).ok().flatten()).collect::<String>()
    };
    c.bench_function("stream, tokenizers crate", |b| b.iter(|| plain_stream(black_box(&ids))));
}

criterion_group!(benches, text);
criterion_main!(benches);
