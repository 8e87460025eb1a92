//! Pictures of a camera's size and what becomes of them, beside the decoders and the resizing of the `image` crate.

#![allow(missing_docs)]

use std::hint::black_box;
use std::io::Cursor;

use blip2::pixels::{Alpha, Limits, Picture, Pixels, Preprocess, Resample, ResizeTo};
use criterion::{Criterion, criterion_group, criterion_main};
use image::RgbImage;
use image::imageops::FilterType;

const SIDES: (u32, u32) = (1600, 1200);

/// The largest sample, as a camera would have taken it.
fn photo() -> RgbImage {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/samples/5.png");
    let sample = Picture::open(path.as_ref(), &Limits::default()).expect("a sample");
    let sample = RgbImage::from_raw(sample.width, sample.height, sample.rgb).expect("three bytes a pixel");
    image::imageops::resize(&sample, SIDES.0, SIDES.1, FilterType::Triangle)
}

fn as_png(photo: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, SIDES.0, SIDES.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().and_then(|mut writer| writer.write_image_data(photo.as_raw())).expect("room in memory");
    bytes
}

fn as_jpeg(photo: &RgbImage) -> Vec<u8> {
    let mut encoder = mozjpeg::Compress::new(mozjpeg::ColorSpace::JCS_RGB);
    encoder.set_size(SIDES.0 as usize, SIDES.1 as usize);
    encoder.set_fastest_defaults();
    encoder.set_quality(90.0);
    let mut started = encoder.start_compress(Vec::new()).expect("room in memory");
    started.write_scanlines(photo.as_raw()).and_then(|()| started.finish()).expect("room in memory")
}

fn with_png_crate(bytes: &[u8]) -> Vec<u8> {
    let mut reader = png::Decoder::new(Cursor::new(bytes)).read_info().expect("a header");
    let mut rgb = vec![0; reader.output_buffer_size().expect("a size")];
    reader.next_frame(&mut rgb).expect("a picture");
    rgb
}

fn with_zune_jpeg(bytes: &[u8]) -> Vec<u8> {
    zune_jpeg::JpegDecoder::new(Cursor::new(bytes)).decode().expect("a picture")
}

fn decode(c: &mut Criterion) {
    let photo = photo();
    let ours = |bytes: &[u8]| Picture::decode(bytes, &Limits::default()).expect("a picture");
    let (png, jpeg) = (as_png(&photo), as_jpeg(&photo));
    c.bench_function("decode PNG", |b| b.iter(|| ours(black_box(&png))));
    c.bench_function("decode PNG, png crate", |b| b.iter(|| with_png_crate(black_box(&png))));
    c.bench_function("decode JPEG", |b| b.iter(|| ours(black_box(&jpeg))));
    c.bench_function("decode JPEG, zune-jpeg", |b| b.iter(|| with_zune_jpeg(black_box(&jpeg))));
}

fn resize(c: &mut Criterion) {
    let photo = photo();
    let picture = Picture::from_rgb(SIDES.0, SIDES.1, photo.as_raw().clone());
    let how = Preprocess {
        size: 224,
        alpha: Alpha::White,
        resize: ResizeTo::Square,
        center_crop: false,
        mean: [0.48, 0.46, 0.41],
        std: [0.27, 0.26, 0.28],
        rescale: 1.0 / 255.0,
        resample: Resample::Bicubic,
    };
    c.bench_function("resize", |b| b.iter(|| how.square(black_box(&picture))));
    let image = |photo: &RgbImage| image::imageops::resize(photo, how.size, how.size, FilterType::CatmullRom);
    c.bench_function("resize, image crate", |b| b.iter(|| image(black_box(&photo))));
    c.bench_function("resize and normalise", |b| b.iter(|| Pixels::from_pictures(&[black_box(&picture)], &how)));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = decode, resize
}
criterion_main!(benches);
