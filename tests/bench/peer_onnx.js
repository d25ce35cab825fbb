// ONNX Runtime with the ViT that peer_torch.py exports.
//
//     NODE_PATH=PEERS/node_modules node peer_onnx.js vit.onnx vit-8|vit-1 THREADS
//
// Prints one line of JSON: seconds per image (median of three runs after one that is not counted).
'use strict';

async function main() {
  const [path, line, threads] = process.argv.slice(2);
  const images = { 'vit-8': 8, 'vit-1': 1 }[line];
  if (!images) throw new Error('usage: peer_onnx.js vit.onnx vit-8|vit-1 THREADS');
  const ort = require('onnxruntime-node');
  const session = await ort.InferenceSession.create(path, {
    intraOpNumThreads: Number(threads), interOpNumThreads: 1,
    graphOptimizationLevel: 'all', executionProviders: ['cpu'],
  });
  const pixels = Float32Array.from({ length: images * 3 * 224 * 224 }, (_, i) => (i * 7919 % 2003) / 1001 - 1);
  const feeds = { pixels: new ort.Tensor('float32', pixels, [images, 3, 224, 224]) };
  const time = async (repeat) => {
    const start = process.hrtime.bigint();
    for (let i = 0; i < repeat; i++) await session.run(feeds);
    return Number(process.hrtime.bigint() - start) * 1e-9 / repeat;
  };
  await time(1);
  const repeat = Math.floor(0.5 / await time(1)) + 1;
  const runs = [await time(repeat), await time(repeat), await time(repeat)].sort((a, b) => a - b);
  const output = (await session.run(feeds)).output;
  if (!output.data.every(Number.isFinite)) throw new Error('the output is not finite');
  console.log(JSON.stringify({ name: line, threads: Number(threads), seconds: runs[1] / images,
                               version: require('onnxruntime-node/package.json').version }));
}

main().catch((error) => {
  console.error(error.message.split('\n')[0]);
  process.exit(1);
});
