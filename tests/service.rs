//! Threads around an engine: every job is told its end, of a thread that panicked too, and the next ones come through.

#![allow(clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use blip2::bundle::TaskName;
use blip2::engine::{Engine, Generation, GenerationOptions, Sight};
use blip2::pixels::{Limits, Picture};
use blip2::prompt::Task;
use blip2::runtime::{Provider, ProviderChoice, RuntimeOptions};
use blip2::service::{Job, Options, Outcome, Progress, Service, Source, Terms, Want};
use blip2::{Error, Ranked};

const PATIENCE: Duration = Duration::from_secs(60);

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn engine(bundle: &str) -> Engine {
    let options = RuntimeOptions { provider: ProviderChoice::Only(Provider::Cpu), ..RuntimeOptions::default() };
    Engine::open(&at(bundle), &options).unwrap()
}

fn service() -> Service {
    Service::start(engine("tests/bundles/t5"), Options::default())
}

fn picture() -> Source {
    Source::Encoded(std::fs::read(at("models/samples/0.png")).unwrap().into(), Limits::default())
}

fn caption() -> Want {
    Want::Write(Task::Caption, Box::default())
}

/// A caption that takes as long as the bundle's positions let it.
fn long_caption(service: &Service) -> Want {
    let options = GenerationOptions { max_new_tokens: Some(500), min_new_tokens: Some(500), beams: Some(4), ..Default::default() };
    Want::Write(Task::Caption, Box::new(service.context().generation(TaskName::Caption, &options).unwrap()))
}

/// Takes a job in line; its end comes out of what is returned. `on_settled` sees all that comes before.
fn submit(service: &Service, want: Want, terms: Terms, on_settled: impl Fn() + Send + 'static) -> Receiver<Result<Outcome, Error>> {
    let (to, ends) = channel();
    let tell = Box::new(move |progress: Progress<'_>| {
        match progress {
            Progress::Settled(..) => on_settled(),
            // A test that has seen enough is gone.
            Progress::End(end) => drop(to.send(end)),
        }
        ControlFlow::Continue(())
    });
    service.submit(Job { source: picture(), want, terms, tell }).unwrap();
    ends
}

fn ask(service: &Service, source: Source, want: Want) -> Result<Outcome, Error> {
    let (to, ends) = channel();
    let tell = Box::new(move |progress: Progress<'_>| {
        if let Progress::End(end) = progress {
            to.send(end).unwrap();
        }
        ControlFlow::Continue(())
    });
    service.submit(Job { source, want, terms: Terms { keeps: true, ..Terms::default() }, tell })?;
    ends.recv_timeout(PATIENCE).unwrap()
}

fn text(end: Result<Outcome, Error>) -> String {
    match end.unwrap() {
        Outcome::Written(answer) => answer.text,
        other => panic!("{other:?}"),
    }
}

fn end(ends: &Receiver<Result<Outcome, Error>>) -> Result<Outcome, Error> {
    ends.recv_timeout(PATIENCE).unwrap()
}

#[test]
fn jobs_beside_a_panic_are_told_so_and_the_next_come_through() {
    let service = service();
    let sound = text(end(&submit(&service, caption(), Terms::default(), || {})));
    let fatal = submit(&service, caption(), Terms::default(), || panic!("a caller's own fault"));
    assert!(matches!(end(&fatal), Err(Error::Lost)));
    for _ in 0..2 {
        assert_eq!(text(end(&submit(&service, caption(), Terms::default(), || {}))), sound);
    }
    assert!(service.is_alive());
}

#[test]
fn a_service_that_ends_finishes_what_it_took() {
    let service = service();
    let ends: Vec<_> = (0..5).map(|_| submit(&service, caption(), Terms::default(), || {})).collect();
    drop(service);
    let texts: Vec<String> = ends.iter().map(|ends| text(end(ends))).collect();
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
}

#[test]
fn a_caller_that_goes_away_is_dropped_within_a_step_wherever_its_job_is() {
    let service = service();
    let (terms, waiting) = (Terms::default(), Terms::default());
    let running = submit(&service, long_caption(&service), terms.clone(), || {});
    waiting.gone.leave();
    assert!(matches!(end(&submit(&service, caption(), waiting, || {})), Err(Error::Gone)));
    // Beams settle nothing on the way, so that nothing else could have told it.
    terms.gone.leave();
    assert!(matches!(end(&running), Err(Error::Gone)));
    assert!(!text(end(&submit(&service, caption(), Terms::default(), || {}))).is_empty());
}

#[test]
fn what_waited_too_long_is_not_begun() {
    let service = service();
    let late = Terms { deadline: Some(Instant::now()), ..Terms::default() };
    assert!(matches!(end(&submit(&service, caption(), late, || {})), Err(Error::Late)));
    let early = Terms { deadline: Some(Instant::now() + PATIENCE), ..Terms::default() };
    assert!(end(&submit(&service, caption(), early, || {})).is_ok());
}

#[test]
fn a_full_line_refuses_at_once() {
    let service = Service::start(engine("tests/bundles/t5"), Options { capacity: 3, ..Options::default() });
    let mut ends = Vec::new();
    let refused = loop {
        let (to, told) = channel();
        let tell = Box::new(move |progress: Progress<'_>| {
            if let Progress::End(end) = progress {
                to.send(end).unwrap();
            }
            ControlFlow::Continue(())
        });
        let (source, want) = (picture(), long_caption(&service));
        match service.submit(Job { source, want, terms: Terms::default(), tell }) {
            Ok(()) => ends.push(told),
            Err(error) => break error,
        }
        assert!(ends.len() < 10_000, "the line has no end");
    };
    assert!(matches!(refused, Error::Overloaded), "{refused:?}");
    assert!(ends.iter().all(|ends| end(ends).is_ok()));
}

#[test]
fn a_picture_is_looked_at_once_and_asked_about_many_times() {
    let service = service();
    let Outcome::Seen(sight) = ask(&service, picture(), Want::See).unwrap() else { panic!("it was looked at") };
    let anew = text(ask(&service, picture(), caption()));
    let seen = |sight: &Sight| Source::Seen(Box::new(sight.clone()));
    let Outcome::Written(again) = ask(&service, seen(&sight), caption()).unwrap() else { panic!("it was written") };
    assert_eq!(again.text, anew);
    assert!(again.timings.iter().all(|(stage, _)| stage.name() != "vision"), "{:?}", again.timings);
}

#[test]
fn a_picture_that_comes_again_is_not_looked_at_again() {
    let options = Options { kept_bytes: 64 << 20, ..Options::default() };
    let service = Service::start(engine("tests/bundles/t5"), options);
    let texts: Vec<_> = (0..3).map(|_| text(ask(&service, picture(), caption()))).collect();
    assert!(texts.iter().all(|text| *text == texts[0]));
    let kept = service.kept();
    assert_eq!((kept.hits, kept.misses), (2, 1));
}

#[test]
fn candidates_are_ranked_as_the_engine_ranks_them() {
    let answers = ["red", "a small blue circle", "green"];
    let mut engine = engine("tests/bundles/vqa-opt");
    let sight = {
        let picture = Picture::open(&at("models/samples/0.png"), &Limits::default()).unwrap();
        engine.see(&[&picture]).unwrap().remove(0)
    };
    let task = Task::Ask("what is it?".into());
    let wanted = engine.rank(&sight, &task, &answers).unwrap();
    let service = Service::start(engine, Options::default());
    let want = Want::Rank(task, answers.map(str::to_owned).to_vec());
    let Outcome::Ranked(found, _) = ask(&service, picture(), want).unwrap() else { panic!("it was ranked") };
    let near = |(a, b): (&Ranked, &Ranked)| {
        a.text == b.text && a.index == b.index && a.n_tokens == b.n_tokens && (a.log_likelihood - b.log_likelihood).abs() < 1e-4
    };
    assert!(found.len() == 3 && found.iter().zip(&wanted).all(near), "{found:?} {wanted:?}");
}

#[test]
fn what_the_bundle_cannot_do_is_refused_before_it_waits() {
    let service = service();
    let refused = |source, want| ask(&service, source, want).unwrap_err();
    assert!(matches!(refused(picture(), Want::Match(vec!["a".into()])), Error::Bundle(_)));
    assert!(matches!(refused(Source::Texts, caption()), Error::NoPicture));
    let nothing = Generation { max_new_tokens: Some(0), ..Generation::default() };
    assert!(matches!(refused(picture(), Want::Write(Task::Caption, Box::new(nothing))), Error::Strategy(_)));
    assert!(matches!(refused(picture(), Want::Rank(Task::Ask("what?".into()), Vec::new())), Error::Prompt(_)));
}
