//! Threads around an engine: every job is told its end, of a thread that panicked too.

#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use blip2::Error;
use blip2::engine::Engine;
use blip2::pixels::Limits;
use blip2::prompt::Task;
use blip2::runtime::{Provider, ProviderChoice, RuntimeOptions};
use blip2::service::{Job, Outcome, Progress, Service, Want};

const PATIENCE: Duration = Duration::from_secs(60);

fn service() -> Service {
    let options = RuntimeOptions { provider: ProviderChoice::Only(Provider::Cpu), ..RuntimeOptions::default() };
    let bundle = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bundles/t5");
    Service::start(Engine::open(&bundle, &options).unwrap(), 1)
}

/// Takes a picture in line; its end comes out of what is returned. `on_settled` sees all that comes before.
fn submit(service: &Service, on_settled: impl Fn() + Send + 'static) -> Receiver<Result<String, Error>> {
    let (to, ends) = channel();
    let tell = Box::new(move |progress: Progress<'_>| {
        match progress {
            Progress::Settled(..) => on_settled(),
            Progress::End(Ok(Outcome::Written(answer))) => to.send(Ok(answer.text)).unwrap(),
            Progress::End(Ok(other)) => panic!("{other:?}"),
            Progress::End(Err(error)) => to.send(Err(error)).unwrap(),
        }
        ControlFlow::Continue(())
    });
    let picture = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/samples/0.png")).unwrap();
    let want = Want::Write(Task::Caption, Box::default());
    service.submit(Job { picture: picture.into(), limits: Limits::default(), want, tell }).unwrap();
    ends
}

#[test]
fn jobs_of_a_thread_that_panicked_are_told_so() {
    let service = service();
    let sound = submit(&service, || {}).recv_timeout(PATIENCE).unwrap();
    assert!(sound.is_ok());
    let fatal = submit(&service, || panic!("a caller's own fault"));
    assert!(matches!(fatal.recv_timeout(PATIENCE).unwrap(), Err(Error::Lost)));
    // The thread that writes is gone: whoever comes now waits for nobody.
    for late in [submit(&service, || {}), submit(&service, || {})] {
        assert!(matches!(late.recv_timeout(PATIENCE).unwrap(), Err(Error::Lost)));
    }
}

#[test]
fn a_service_that_ends_finishes_what_it_took() {
    let service = service();
    let ends: Vec<_> = (0..5).map(|_| submit(&service, || {})).collect();
    drop(service);
    let texts: Vec<String> = ends.iter().map(|end| end.recv_timeout(PATIENCE).unwrap().unwrap()).collect();
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
}
